// What one kernel for feature maps is: plain data, so that sources compiled for wide vectors may include it.
// The products of a convolution are those of spmm; what is left are the ways from accumulators to maps and
// from a map to a map.
#pragma once

#include <cstddef>

#include "kernels/row.h"

namespace sparse_ops::spconv {

// How accumulators become feature maps: y = act(acc + residual).
struct MapEpilogue {
  enum class Activation { none, clip, silu, hard_swish };  // ReLU is a clip from 0 to infinity
  Activation activation;
  float low, high;  // of the clip
};

// What a window gives on a map with a padded border: bias + the sum over i, j of filter[i, j] * from[i *
// tap_row_step + j * tap_column_step + r * row_step + c * column_step] for r < rows, c < columns. Kernels may
// touch kMapSlack floats behind what that reads.
struct MapProduct {
  const unsigned char* filter;  // float32 [window_rows, window_columns], any alignment
  float bias;
  const float* from;
  size_t window_rows, window_columns;
  size_t tap_row_step, tap_column_step;
  size_t row_step, column_step;
  size_t rows, columns;
};
constexpr size_t kMapSlack = 32;

// Neighbouring elements of a channel's part of a panel: every `stride`-th of a row of the image, or what
// there is outside of it.
struct Piece {
  size_t to, count;
  size_t from;  // counted from the beginning of the channel in the first image
  bool outside;
};

// What `count` pieces of every channel are copied from.
struct Pieces {
  const Piece* pieces;
  size_t count, stride;
  const float* outside;
};

struct Kernel : KernelRow {
  // The pieces of `channels` channels, `plane` floats apart in `from`, to `panel`, where they are `rows`
  // floats apart. Nothing is touched behind a piece on either side.
  void (*copy_pieces)(const Pieces& pieces, const float* from, size_t plane, size_t channels, size_t rows,
                      float* panel);

  // The first `positions` elements of `channels` rows of accumulators, which are `acc_stride` floats apart,
  // to rows that are `stride` floats apart in `y` and in `residual` (nullptr: none): y[n, p] = act(acc[n, p]
  // + residual[n, p]).
  void (*store_channels)(const MapEpilogue& epilogue, const float* acc, size_t acc_stride, size_t channels,
                         size_t positions, size_t stride, const float* residual, float* y);

  // One map of a depthwise convolution, to y[r, c] = act(sum + residual[r, c]) (residual may be nullptr).
  void (*depthwise)(const MapEpilogue& epilogue, const MapProduct& product, const float* residual, float* y);
};

}  // namespace sparse_ops::spconv
