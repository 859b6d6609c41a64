// Plain loops in double: what the other kernels are compared with.

#include <cmath>
#include <cstring>

#include "kernels/spconv/table.h"

namespace sparse_ops::spconv {
namespace {

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

void copy_pieces(const Pieces& p, const float* from, size_t plane, size_t channels, size_t rows,
                 float* panel) {
  for (size_t channel = 0; channel < channels; ++channel) {
    for (size_t i = 0; i < p.count; ++i) {
      const Piece& piece = p.pieces[i];
      for (size_t e = 0; e < piece.count; ++e) {
        const float* image = from + channel * plane + piece.from;
        const float* element = piece.outside ? p.outside + e : image + e * p.stride;
        std::memcpy(panel + channel * rows + piece.to + e, element, sizeof(float));
      }
    }
  }
}

}  // namespace

constexpr Kernel reference = {agreed(row::reference, 1), copy_pieces, store_channels, depthwise};

}  // namespace sparse_ops::spconv
