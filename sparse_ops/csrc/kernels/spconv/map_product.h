// One map of a depthwise convolution: what is left of a product where every input channel has its own output.
// Included like generic.h.
#pragma once

#include "kernels/spconv/copy_pieces.h"
#include "kernels/spconv/kernel.h"
#include "kernels/spconv/store_channels.h"
#include "kernels/vector.h"

namespace sparse_ops::spconv {
namespace {

// from[0], from[step], from[2 * step], .., `count` of them at least; kStep is 0 where only `step` is known.
template <size_t kLanes, size_t kStep>
inline Vector<kLanes> load_strided(const float* from, size_t step, size_t count) {
  if constexpr (kStep == 1) return load<kLanes>(from);
  if constexpr (kStep == 2) return every_second<kLanes, 0>(load<kLanes>(from), load<kLanes>(from + kLanes));
  Vector<kLanes> v = {};
  for (size_t i = 0; i < count; ++i) v[i] = from[i * step];
  return v;
}

// `count` <= kLanes floats; neither side is touched behind them.
template <size_t kLanes>
inline void copy_part(const float* from, size_t count, float* to) {
  if constexpr (kLanes == 1) {
    if (count == 1) *to = *from;
  } else if (constexpr size_t kHalf = kLanes / 2; count >= kHalf) {
    const Vector<kHalf> first = load<kHalf>(from), last = load<kHalf>(from + count - kHalf);
    store<kHalf>(to, first);
    store<kHalf>(to + count - kHalf, last);
  } else {
    copy_part<kHalf>(from, count, to);
  }
}

// `count` results of a vector, the ones from `at` on, with what is left to do. What lies behind them are rows
// that come later.
template <size_t kLanes, class Function>
[[gnu::always_inline]] inline void store_results(const MapProduct& p, Vector<kLanes> sum, size_t count,
                                                 size_t at, const float* residual, float* y,
                                                 Function function) {
  y += at;
  if (residual != nullptr) residual += at;
  if (count == kLanes || at + kLanes <= p.rows * p.columns) {
    if (residual != nullptr) sum += load<kLanes>(residual);
    return store<kLanes>(y, function(sum));
  }
  float part[kLanes] = {};
  if (residual != nullptr) {
    copy_part<kLanes>(residual, count, part);
    sum += load<kLanes>(part);
  }
  store<kLanes>(part, function(sum));
  copy_part<kLanes>(part, count, y);
}

// Any window and step, one vector of results after another.
template <size_t kLanes, size_t kStep>
inline Vector<kLanes> any_window(const MapProduct& p, const float* from, size_t count) {
  Vector<kLanes> sum = splat<kLanes>(p.bias);
  const unsigned char* value = p.filter;
  for (size_t i = 0; i < p.window_rows; ++i) {
    for (size_t j = 0; j < p.window_columns; ++j, value += sizeof(float)) {
      const float* tap = from + i * p.tap_row_step + j * p.tap_column_step;
      sum += splat<kLanes>(load_float(value)) * load_strided<kLanes, kStep>(tap, p.column_step, count);
    }
  }
  return sum;
}

constexpr size_t kStripRows = kRegisters == 32 ? 4 : 2;

// A window of 3 x 3, kStripRows rows at once: what is loaded serves all results that see it.
template <size_t kLanes, size_t kStep>
[[gnu::always_inline]] inline void strip_3x3(const float* from, size_t pitch, const Vector<kLanes>* w,
                                             Vector<kLanes>* sum) {
#pragma GCC unroll 16
  for (size_t i = 0; i < (kStripRows - 1) * kStep + 3; ++i) {
    const float* row = from + i * pitch;
    Vector<kLanes> x[3];
    if constexpr (kStep == 1) {
      for (size_t j = 0; j < 3; ++j) x[j] = load<kLanes>(row + j);
    } else {
      const Vector<kLanes> a = load<kLanes>(row), b = load<kLanes>(row + kLanes);
      x[0] = every_second<kLanes, 0>(a, b);
      x[1] = every_second<kLanes, 1>(a, b);
      x[2] = load_strided<kLanes, 2>(row + 2, 2, kLanes);
    }
#pragma GCC unroll 16
    for (size_t r = 0; r < kStripRows; ++r) {
      if (i < r * kStep || i >= r * kStep + 3) continue;
#pragma GCC unroll 3
      for (size_t j = 0; j < 3; ++j) sum[r] += w[(i - r * kStep) * 3 + j] * x[j];
    }
  }
}

// Calls use(column, count) for the vectors of a row; the last one overlaps the one before. A row shorter than
// a vector is longer than half of it, or of four lanes.
template <size_t kLanes, class Use>
[[gnu::always_inline]] inline void for_columns(size_t columns, Use use) {
  if (columns < kLanes) return use(size_t{0}, columns);
  for (size_t c = 0; c < columns; c += kLanes) use(c + kLanes <= columns ? c : columns - kLanes, kLanes);
}

template <size_t kLanes, size_t kStep, class Function>
void depthwise_strips(const MapProduct& p, const float* residual, float* y, Function function) {
  Vector<kLanes> w[9];
#pragma GCC unroll 16
  for (size_t t = 0; t < 9; ++t) w[t] = splat<kLanes>(load_float(p.filter + 4 * t));
  for (size_t row = 0; row < p.rows; row += kStripRows) {
    const size_t first = row + kStripRows <= p.rows ? row : p.rows - kStripRows;  // overlaps, too
    for_columns<kLanes>(p.columns, [&](size_t column, size_t count) {
      Vector<kLanes> sum[kStripRows];
#pragma GCC unroll 16
      for (size_t r = 0; r < kStripRows; ++r) sum[r] = splat<kLanes>(p.bias);
      strip_3x3<kLanes, kStep>(p.from + first * p.row_step + column * kStep, p.tap_row_step, w, sum);
#pragma GCC unroll 16
      for (size_t r = 0; r < kStripRows; ++r) {
        store_results<kLanes>(p, sum[r], count, (first + r) * p.columns + column, residual, y, function);
      }
    });
  }
}

template <size_t kLanes, size_t kStep, class Function>
void depthwise_rows(const MapProduct& p, const float* residual, float* y, Function function) {
  if constexpr (kStep != 0) {
    const bool square = p.window_rows == 3 && p.window_columns == 3 && p.tap_column_step == 1;
    if (square && p.row_step == kStep * p.tap_row_step && p.rows >= kStripRows) {
      return depthwise_strips<kLanes, kStep>(p, residual, y, function);
    }
  }
  for (size_t r = 0; r < p.rows; ++r) {
    for_columns<kLanes>(p.columns, [&](size_t column, size_t count) {
      const float* from = p.from + r * p.row_step + column * p.column_step;
      const Vector<kLanes> sum = any_window<kLanes, kStep>(p, from, count);
      store_results<kLanes>(p, sum, count, r * p.columns + column, residual, y, function);
    });
  }
}

template <size_t kLanes, class Function>
void depthwise_lanes(const MapProduct& p, const float* residual, float* y, Function function) {
  if constexpr (kLanes > 4) {  // for short rows
    if (p.columns <= kLanes / 2) return depthwise_lanes<kLanes / 2>(p, residual, y, function);
  }
  if (p.column_step == 1) return depthwise_rows<kLanes, 1>(p, residual, y, function);
  if (p.column_step == 2) return depthwise_rows<kLanes, 2>(p, residual, y, function);
  depthwise_rows<kLanes, 0>(p, residual, y, function);
}

template <size_t kLanes>
void depthwise(const MapEpilogue& epilogue, const MapProduct& p, const float* residual, float* y) {
  with_activation(epilogue, [&](auto function) { depthwise_lanes<kLanes>(p, residual, y, function); });
}

}  // namespace
}  // namespace sparse_ops::spconv
