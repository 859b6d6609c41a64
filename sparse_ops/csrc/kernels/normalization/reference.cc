// Plain loops in double: what the other kernels are compared with.

#include <cmath>
#include <cstring>

#include "kernels/normalization/table.h"

namespace sparse_ops::normalization {
namespace {

float element(const void* array, size_t index) {
  float value;
  std::memcpy(&value, static_cast<const char*>(array) + index * sizeof(value), sizeof(value));
  return value;
}

void run_rows(const Arguments& a, size_t begin, size_t end) {
  const double channels = static_cast<double>(a.channels);
  for (size_t row = begin; row < end; ++row) {
    float* y = a.y + row * a.channels;
    const auto sum_at = [&](size_t c) {  // in float, as it is when it is an output
      const float x = element(a.x, row * a.channels + c);
      return a.skip != nullptr ? x + element(a.skip, row % a.skip_rows * a.channels + c) : x;
    };
    double mean = 0, square = 0;
    if (a.beta != nullptr) {
      for (size_t c = 0; c < a.channels; ++c) mean += static_cast<double>(sum_at(c));
      mean /= channels;
    }
    for (size_t c = 0; c < a.channels; ++c) square += std::pow(sum_at(c) - mean, 2) / channels;
    const double factor = 1 / std::sqrt(square + static_cast<double>(a.epsilon));
    for (size_t c = 0; c < a.channels; ++c) {
      const float s = sum_at(c), beta = a.beta != nullptr ? element(a.beta, c) : 0;
      if (a.sum != nullptr) a.sum[row * a.channels + c] = s;
      y[c] = static_cast<float>((s - mean) * factor * element(a.gamma, c) + beta);
    }
  }
}

}  // namespace

constexpr Kernel reference = {agreed(row::reference, 1), run_rows};

}  // namespace sparse_ops::normalization
