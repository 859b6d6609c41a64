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
  }
  return h;
}

void multiply(const Weight& w, size_t block, const float* panel, float* acc) {
  double sum[256] = {};
  size_t entry = w.block_entries[block];
  size_t segment = block * w.chunks * w.block;
  for (size_t c = 0; c < w.chunks; ++c) {
    for (size_t s = 0; s < w.block; ++s, ++segment) {
      for (size_t i = 0; i < w.counts[segment]; ++i, ++entry) {
        float value;
        std::memcpy(&value, w.values + entry * sizeof(float), sizeof(value));
        sum[w.rows[segment]] += static_cast<double>(value) * panel[c * w.chunk + w.offsets[entry]];
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

double peak(size_t steps) {
  volatile double sum = 0;
  for (size_t i = 0; i < steps; ++i) sum = sum * 0.5 + 0.25;
  return 2.0 * static_cast<double>(steps);
}

}  // namespace

constexpr Kernel reference = {"reference", Isa::reference, 1,   255, transpose, multiply,
                              activate,    store_tokens,   peak};

}  // namespace sparse_ops::spmm
