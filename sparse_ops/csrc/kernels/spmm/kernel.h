// What one kernel for Y = act(X . W + bias) is: plain data, so that sources compiled for wide vectors may
// include it. The columns of W may belong to several outputs, or be those of a gate and of what it
// multiplies.
//
// W is stored in the chunked_csc format, described in sparse_ops/formats/chunked_csc.py. A kernel works on
// tiles of tokens. X is first transposed, tile by tile, into panels [K, tile], so that one stored weight multiplies
// whole vectors of tokens. Then each (tile, block of output channels) is one independent task, which
// accumulates chunk by chunk, applies the activation and writes its part of Y.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu_features.h"

namespace sparse_ops::spmm {

enum class Activation { none, relu, gelu, gelu_tanh, silu, quick_gelu };

// A weight whose arrays were checked (formats/chunked_csc.h). Nothing is owned, and `values` and `bias` may
// have any alignment.
struct Weight {
  size_t K, N;  // N with the zeros that fill the last block of each of several linears but the last
  size_t chunk, block, width;
  size_t chunks, blocks;        // K / chunk and N / block, rounded up
  const unsigned char* values;  // float32, `width` of each entry
  const uint8_t* offsets;
  const uint8_t* counts;
  const uint8_t* rows;
  const uint64_t* block_entries;  // [blocks] index of the first entry of each block
  uint64_t entries;
  const unsigned char* bias;  // float32 [N], 0 for outputs of zeros
  Activation activation;
  bool gated;  // Y = act(first half of the blocks of X . W + bias) * second half
};

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

// The accumulators of one task live on the stack, so that tile * block may not exceed this (64 KiB).
constexpr size_t kMaxAccumulators = 16384;

struct Kernel {
  const char* name;
  Isa isa;
  size_t tile;       // tokens
  size_t max_chunk;  // of the weights that it takes
  size_t max_width;
  size_t wide_vectors;  // loaded at a time for wide entries: the more, the fewer loads of weights

  // Columns begin..end-1 of `tokens` <= tile rows of `x` [tokens, K] into the same rows of `panel` [K, tile],
  // which is 64-byte aligned; missing tokens become zeros.
  void (*transpose)(const float* x, size_t tokens, size_t K, size_t begin, size_t end, float* panel);

  // One block of output channels for one tile, with the bias: acc [block, tile], 64-byte aligned. Rows of
  // channels behind N hold anything.
  void (*multiply)(const Weight& weight, size_t block, const float* panel, float* acc);

  // `size` numbers in place; as many as a vector has may be touched behind them.
  void (*activate)(Activation activation, float* data, size_t size);

  // acc [channels, tile] to the first `tokens` rows of `y`, which are `stride` floats apart: y[t, n] = acc[n,
  // t].
  void (*store_tokens)(const float* acc, size_t channels, size_t tokens, size_t stride, float* y);

  // The first `positions` elements of `channels` rows of accumulators, which are `acc_stride` floats apart,
  // to rows that are `stride` floats apart in `y` and in `residual` (nullptr: none): y[n, p] = act(acc[n, p]
  // + residual[n, p]).
  void (*store_channels)(const MapEpilogue& epilogue, const float* acc, size_t acc_stride, size_t channels,
                         size_t positions, size_t stride, const float* residual, float* y);

  // One map of a depthwise convolution, to y[r, c] = act(sum + residual[r, c]) (residual may be nullptr).
  void (*depthwise)(const MapEpilogue& epilogue, const MapProduct& product, const float* residual, float* y);

  // `steps` times some independent multiply-adds in registers, as wide as the kernel's; returns how many
  // floating-point operations that was. Timing it gives what the machine could reach at most.
  double (*peak)(size_t steps);

  // The same with one factor of every multiply-add loaded from the first-level cache, as multiply() has to:
  // the limit of a kernel that uses each activation that it loads once.
  double (*load_peak)(size_t steps);
};

}  // namespace sparse_ops::spmm
