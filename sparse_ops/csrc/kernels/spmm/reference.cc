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

double activated(const MapEpilogue& epilogue, double h) {
  switch (epilogue.activation) {
    case MapEpilogue::Activation::none:
      return h;
    case MapEpilogue::Activation::clip:
      return h < epilogue.low ? epilogue.low : h > epilogue.high ? epilogue.high : h;
    case MapEpilogue::Activation::silu:
      return h / (1 + std::exp(-h));
    case MapEpilogue::Activation::hard_swish:
      return h <= -3 ? h * 0 : h >= 3 ? h : h * (h / 6 + 0.5);
  }
  return h;
}

void store_channels(const MapEpilogue& epilogue, const float* acc, size_t acc_stride, size_t channels,
                    size_t positions, size_t stride, const float* residual, float* y) {
  for (size_t n = 0; n < channels; ++n) {
    for (size_t p = 0; p < positions; ++p) {
      const double added = residual != nullptr ? static_cast<double>(residual[n * stride + p]) : 0.0;
      y[n * stride + p] = static_cast<float>(activated(epilogue, acc[n * acc_stride + p] + added));
    }
  }
}

void depthwise(const MapEpilogue& epilogue, const MapProduct& p, const float* residual, float* y) {
  for (size_t r = 0; r < p.rows; ++r) {
    for (size_t c = 0; c < p.columns; ++c, ++y) {
      double sum = p.bias;
      for (size_t tap = 0; tap < p.window_rows * p.window_columns; ++tap) {
        const size_t i = tap / p.window_columns, j = tap % p.window_columns;
        float value;
        std::memcpy(&value, p.filter + tap * sizeof(float), sizeof(value));
        sum += static_cast<double>(value) *
               p.from[i * p.tap_row_step + j * p.tap_column_step + r * p.row_step + c * p.column_step];
      }
      if (residual != nullptr) sum += residual[r * p.columns + c];
      *y = static_cast<float>(activated(epilogue, sum));
    }
  }
}

double peak(size_t steps) {
  volatile double sum = 0;
  for (size_t i = 0; i < steps; ++i) sum = sum * 0.5 + 0.25;
  return 2.0 * static_cast<double>(steps);
}

}  // namespace

constexpr Kernel reference = {
    "reference",  Isa::reference, 1,       255,  8,   1, transpose, multiply, activate,
    store_tokens, store_channels, depthwise, peak, peak};

}  // namespace sparse_ops::spmm
