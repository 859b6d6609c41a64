// Random weights in the chunked_csc format, for the test and the benchmark of the kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/spmm/check.h"

namespace sparse_ops::spmm {

struct RandomWeight {
  size_t K, N, chunk, block;
  std::vector<float> values;
  std::vector<uint8_t> offsets, counts, rows;
  std::vector<float> bias;

  StoredWeight stored() const {
    return {static_cast<int64_t>(K),
            static_cast<int64_t>(N),
            static_cast<int64_t>(chunk),
            static_cast<int64_t>(block),
            values.data(),
            values.size(),
            offsets.data(),
            offsets.size(),
            counts.data(),
            counts.size(),
            rows.data(),
            rows.size(),
            bias.data(),
            bias.size()};
  }
};

// Every weight is kept with probability `density`. Same arguments, same weight.
inline RandomWeight random_weight(size_t K, size_t N, double density, size_t chunk, size_t block) {
  std::mt19937 generator(static_cast<unsigned>(K * 31 + N));
  std::bernoulli_distribution keep(density);
  std::uniform_real_distribution<float> value(-1.0f, 1.0f);
  RandomWeight w{K, N, chunk, block, {}, {}, {}, {}, std::vector<float>(N)};
  for (float& b : w.bias) b = value(generator);
  for (size_t first = 0; first < N; first += block) {
    for (size_t begin = 0; begin < K; begin += chunk) {
      std::vector<std::vector<uint8_t>> kept(block);
      for (size_t n = 0; n < block; ++n) {
        for (size_t k = begin; k < std::min(begin + chunk, K) && first + n < N; ++k) {
          if (keep(generator)) kept[n].push_back(static_cast<uint8_t>(k - begin));
        }
      }
      std::vector<uint8_t> order(block);
      std::iota(order.begin(), order.end(), uint8_t{0});
      std::stable_sort(order.begin(), order.end(),
                       [&](auto a, auto b) { return kept[a].size() > kept[b].size(); });
      for (uint8_t row : order) {
        w.rows.push_back(row);
        w.counts.push_back(static_cast<uint8_t>(std::max<size_t>(1, kept[row].size())));
        for (uint8_t k : kept[row]) {
          w.offsets.push_back(k);
          w.values.push_back(value(generator));
        }
        if (kept[row].empty()) {
          w.offsets.push_back(0);
          w.values.push_back(0.0f);
        }
      }
    }
  }
  return w;
}

}  // namespace sparse_ops::spmm
