// Random weights in the chunked_csc format, for the test and the benchmark of the kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "formats/chunked_csc.h"

namespace sparse_ops::spmm {

using chunked_csc::check;
using chunked_csc::CheckedWeight;
using chunked_csc::StoredWeight;

struct RandomWeight {
  size_t K, N, chunk, block, width;
  std::vector<float> values;
  std::vector<uint8_t> offsets, counts, rows;
  std::vector<float> bias;
  std::vector<int64_t> parts = {};

  StoredWeight stored() const {
    return {static_cast<int64_t>(K),
            static_cast<int64_t>(N),
            static_cast<int64_t>(chunk),
            static_cast<int64_t>(block),
            static_cast<int64_t>(width),
            values.data(),
            values.size(),
            offsets.data(),
            offsets.size(),
            counts.data(),
            counts.size(),
            rows.data(),
            rows.size(),
            bias.data(),
            bias.size(),
            parts};
  }
};

// How zeros are spread: every entry alone with some probability, or the same number in each group of `of` inputs.
struct Pattern {
  Pattern(double share, size_t group = 0) : density(share), of(group) {}
  double density;
  size_t of;
};

// Same arguments, same weight. `width` neighbouring outputs are kept or dropped together.
inline RandomWeight random_weight(size_t K, size_t N, Pattern pattern, size_t chunk, size_t block,
                                  size_t width = 1) {
  std::mt19937 generator(static_cast<unsigned>(K * 31 + N));
  std::bernoulli_distribution keep(pattern.density);
  std::uniform_real_distribution<float> value(-1.0f, 1.0f);
  RandomWeight w{K, N, chunk, block, width, {}, {}, {}, {}, std::vector<float>(N), {}};
  for (float& b : w.bias) b = value(generator);
  const size_t groups = block / width;
  for (size_t first = 0; first < N; first += block) {
    for (size_t begin = 0; begin < K; begin += chunk) {
      const size_t end = std::min(begin + chunk, K);
      std::vector<std::vector<uint8_t>> kept(groups);
      for (size_t g = 0; g < groups && first + g * width < N; ++g) {
        for (size_t k = begin; k < end; ++k) {
          if (pattern.of == 0) {
            if (keep(generator)) kept[g].push_back(static_cast<uint8_t>(k - begin));
          } else if (k % pattern.of == 0) {
            std::vector<size_t> inputs(std::min(pattern.of, end - k));
            std::iota(inputs.begin(), inputs.end(), k - begin);
            std::shuffle(inputs.begin(), inputs.end(), generator);
            inputs.resize(std::min(inputs.size(), static_cast<size_t>(static_cast<double>(pattern.of) *
                                                                      pattern.density + 0.5)));
            std::sort(inputs.begin(), inputs.end());
            kept[g].insert(kept[g].end(), inputs.begin(), inputs.end());
          }
        }
      }
      std::vector<uint8_t> order(groups);
      std::iota(order.begin(), order.end(), uint8_t{0});
      std::stable_sort(order.begin(), order.end(),
                       [&](auto a, auto b) { return kept[a].size() > kept[b].size(); });
      for (uint8_t row : order) {
        w.rows.push_back(row);
        w.counts.push_back(static_cast<uint8_t>(std::max<size_t>(1, kept[row].size())));
        for (uint8_t k : kept[row]) {
          w.offsets.push_back(k);
          for (size_t r = 0; r < width; ++r) w.values.push_back(value(generator));
        }
        if (kept[row].empty()) {
          w.offsets.push_back(0);
          w.values.insert(w.values.end(), width, 0.0f);
        }
      }
    }
  }
  return w;
}

// Linears with these outputs side by side, each in blocks of its own.
inline RandomWeight random_parts(size_t K, const std::vector<size_t>& split, Pattern pattern, size_t chunk,
                                 size_t block, size_t width = 1) {
  RandomWeight all{K, 0, chunk, block, width, {}, {}, {}, {}, {}, {}};
  for (size_t outputs : split) {
    const RandomWeight part = random_weight(K, outputs, pattern, chunk, block, width);
    const auto append = [](auto& to, const auto& from) { to.insert(to.end(), from.begin(), from.end()); };
    append(all.values, part.values);
    append(all.offsets, part.offsets);
    append(all.counts, part.counts);
    append(all.rows, part.rows);
    append(all.bias, part.bias);
    all.N += outputs;
    all.parts.push_back(static_cast<int64_t>(outputs));
  }
  return all;
}

}  // namespace sparse_ops::spmm
