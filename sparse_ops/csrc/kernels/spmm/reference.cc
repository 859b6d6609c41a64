// Plain loops, one token at a time, sums in double: what the other kernels are compared with.

#include <cmath>
#include <cstring>

#include "kernels/spmm/table.h"

namespace sparse_ops::spmm {
namespace {

void transpose(const float* x, size_t, size_t, size_t begin, size_t end, float* panel) {
  std::memcpy(panel + begin, x + begin, (end - begin) * sizeof(float));
}

double activated(Activation activation, double h) {
  switch (activation) {
    case Activation::none:
      return h;
    case Activation::relu:
      return h < 0 ? 0 : h;
    case Activation::gelu:
      return 0.5 * h * std::erfc(-h / std::sqrt(2.0));
    case Activation::gelu_tanh:
      return 0.5 * h * (1 + std::tanh(std::sqrt(2 / M_PI) * (h + 0.044715 * h * h * h)));
    case Activation::silu:
      return h / (1 + std::exp(-h));
    case Activation::quick_gelu:
      return h / (1 + std::exp(-1.702 * h));
  }
  return h;
}

void multiply(const Weight& w, size_t block, const float* panel, float* acc) {
  double sum[256] = {};
  size_t entry = w.block_entries[block];
  const size_t groups = w.block / w.width;
  size_t segment = block * w.chunks * groups;
  for (size_t c = 0; c < w.chunks; ++c) {
    for (size_t s = 0; s < groups; ++s, ++segment) {
      for (size_t i = 0; i < w.counts[segment]; ++i, ++entry) {
        for (size_t r = 0; r < w.width; ++r) {
          float value;
          std::memcpy(&value, w.values + (entry * w.width + r) * sizeof(float), sizeof(value));
          sum[w.rows[segment] * w.width + r] +=
              static_cast<double>(value) * panel[c * w.chunk + w.offsets[entry]];
        }
      }
    }
  }
  for (size_t n = 0; n < w.block && block * w.block + n < w.N; ++n) {
    float bias;
    std::memcpy(&bias, w.bias + (block * w.block + n) * sizeof(float), sizeof(bias));
    acc[n] = static_cast<float>(sum[n] + bias);
  }
}

void activate(Activation activation, float* data, size_t size) {
  for (size_t i = 0; i < size; ++i) data[i] = static_cast<float>(activated(activation, data[i]));
}

void store_tokens(const float* acc, size_t channels, size_t, size_t, float* y) {
  std::memcpy(y, acc, channels * sizeof(float));
}

}  // namespace

constexpr Kernel reference = {
    agreed(row::reference, 1, 1), 255, 8, 1, transpose, multiply, activate, store_tokens};

}  // namespace sparse_ops::spmm
