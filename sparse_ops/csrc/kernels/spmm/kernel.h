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

#include "kernels/row.h"

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

// The accumulators of one task live on the stack, so that tile * block may not exceed this (64 KiB).
constexpr size_t kMaxAccumulators = 16384;

// `tile` counts tokens.
struct Kernel : KernelRow {
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
};

}  // namespace sparse_ops::spmm
