// Random weights in the formats of int8_quads, for the tests and the benchmark of the kernels.
#pragma once

#include "formats/int8_quads.h"
#include "random_weight.h"

namespace sparse_ops::quads {

using int8_quads::CheckedWeight;

struct RandomQuads {
  size_t K, N, chunk, block;
  std::vector<int8_t> values;
  std::vector<uint8_t> offsets, counts, rows;  // empty if `dense`
  std::vector<float> scales, bias;
  bool dense = false;

  // Valid as long as this.
  struct Stored {
    std::vector<int64_t> sizes;
    std::vector<RawArray> parts;
    RawArray bias;
    RawWeight raw() const { return {sizes, parts, bias}; }
  };
  Stored stored() const {
    Stored all{{static_cast<int64_t>(K), static_cast<int64_t>(N), static_cast<int64_t>(chunk),
                static_cast<int64_t>(block)},
               {{values.data(), values.size()}},
               {bias.data(), bias.size()}};
    if (!dense) {
      for (const auto* bytes : {&offsets, &counts, &rows}) all.parts.push_back({bytes->data(), bytes->size()});
    }
    all.parts.push_back({scales.data(), scales.size()});
    return all;
  }
};

// Same arguments, same weight: integers in -limit..limit (128: all there are), with `density` of the quads.
inline RandomQuads random_quads(size_t K, size_t N, double density, size_t chunk, size_t block,
                                int limit = 64) {
  const spmm::RandomWeight places = spmm::random_weight((K + 3) / 4, N, density, chunk, block);
  std::mt19937 generator(static_cast<unsigned>(K * 17 + N));
  std::uniform_int_distribution<int> value(-limit, std::min(limit, 127));
  std::uniform_real_distribution<float> scale(0.001f, 0.01f);
  RandomQuads w{K, N, chunk, block, {}, places.offsets, places.counts, places.rows, {}, places.bias};
  for (size_t i = 0; i < 4 * w.offsets.size(); ++i) w.values.push_back(static_cast<int8_t>(value(generator)));
  for (size_t n = 0; n < N; ++n) w.scales.push_back(scale(generator));
  return w;
}

// The same with all quads of whole chunks and blocks.
inline RandomQuads random_dense(size_t K, size_t N, size_t chunk, size_t block, int limit = 64) {
  RandomQuads w = random_quads(K, N, 0, chunk, block, limit);
  const size_t chunks = ((K + 3) / 4 - 1) / chunk + 1, blocks = (N - 1) / block + 1;
  std::mt19937 generator(static_cast<unsigned>(K * 17 + N));
  std::uniform_int_distribution<int> value(-limit, std::min(limit, 127));
  w.values.clear();
  for (size_t i = 0; i < chunks * chunk * blocks * block * 4; ++i) {
    w.values.push_back(static_cast<int8_t>(value(generator)));
  }
  w.offsets.clear(), w.counts.clear(), w.rows.clear();
  w.dense = true;
  return w;
}

}  // namespace sparse_ops::quads
