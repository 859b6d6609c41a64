// What one kernel for Y = act(round(X) . W + bias) is, with X rounded to 8 bits token by token, or given as
// bytes that all stand for steps of one size, and W of int8 with a scale for each output: plain data, so that
// sources compiled for wide vectors may include it.
//
// W is stored as sparse_ops/formats/int8_quads.py describes: an entry is a *quad*, four neighbouring inputs
// of one output. A kernel works on tiles of tokens. X is first rounded and packed, tile by tile, into panels
// of 32-bit words [quads, tile], four inputs of one token each, so that one stored quad multiplies whole
// vectors of tokens. Sums are exact, so that every kernel gives the same ones. The columns of W may belong to
// several outputs, or be those of a gate and of what it multiplies, each in whole blocks.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/row.h"
#include "kernels/spmm/kernel.h"

namespace sparse_ops::quads {

using spmm::Activation;

// The largest number of inputs, so that no sum, and no part of what corrects it, leaves 32 bits.
constexpr size_t kMaxInputs = 32764;

// Of which products are rounded to a multiple, between two whole ones, before the bias is added.
struct Grid {
  float size = 0;           // 0: they are not
  float low = 0, high = 0;  // multiples, within +-2^16
};

// A weight whose arrays were checked (formats/int8_quads.h). Nothing is owned, and `scales` and `bias` may
// have any alignment.
struct Weight {
  size_t K, N;
  size_t quads;           // of inputs, in whole chunks: those behind K count as zeros
  size_t chunk, block;    // of quads, and of outputs
  size_t chunks, blocks;
  const int8_t* values;  // four of each entry
  const uint8_t* offsets;  // nullptr where no quad is missing; blocks are then multiples of kFullRows
  const uint8_t* counts;
  const uint8_t* rows;
  const uint64_t* block_entries;  // [blocks] index of the first entry of each block
  uint64_t entries;
  const int32_t* sums;  // [N] of the integers of each output
  const unsigned char* scales;  // float32 [N]
  const unsigned char* bias;  // float32 [N]
  Activation activation;
  Grid grid;
  bool gated;  // Y = act(first half of the blocks of X . W + bias) * second half
  bool wide;  // some integer is beyond -64..64: two products of bytes need more than 16 bits
};

// X as bytes: each stands for (byte - zero) * size; signed ones, in two's complement, are 128 less than that
// byte.
struct Bytes {
  const unsigned char* data;
  bool is_signed;
  int32_t zero;  // 0..255: of the bytes as they are without a sign
  float size;
};

// Segments without a missing quad that are computed together.
constexpr size_t kFullRows = 4;

// The accumulators of one task live on the stack, so that tile * block may not exceed this (64 KiB).
constexpr size_t kMaxAccumulators = 16384;

// Tokens that one task rounds: their words fill a cache line of every row of a panel.
constexpr size_t kGroup = 16;

// Rows of a panel: one for each quad, what the zero point of each token is, and the size of its steps.
constexpr size_t panel_rows(size_t quads) { return quads + 2; }

// What is known of the numbers of each token in some rows: the lowest and the highest, 0 among them, and the
// sum of what 0 times each is.
constexpr size_t kExtremes = 3;

// How bytes become bytes, where all positions have the same steps: y = y_zero + min(max(round(factor * sum),
// low), high), sum = bias + (x - x_zero) . W. `bias` of the weight is then int32, at most kMaxBias.
struct ByteSteps {
  int32_t x_zero;        // 0..255
  const float* factors;  // [N], finite and above 0
  int32_t y_zero;        // 0..255, or -128..127
  float low, high;       // whole numbers of at most 255, y_zero away from limits of y
};
constexpr int32_t kMaxBias = int32_t{1} << 30;  // sums stay in 32 bits

// `tile` counts tokens.
struct Kernel : KernelRow {
  // Columns first..first + kGroup - 1 of a panel for `weight`, as far as it has them, from rows of `x`
  // [tokens, K], tokens <= tile; the columns of missing tokens hold anything that can be multiplied.
  void (*round)(const Weight& weight, const float* x, size_t tokens, size_t first, int32_t* panel);

  // The same of tokens that are bytes, the first of them at `x`.
  void (*pack)(const Weight& weight, const Bytes& x, size_t tokens, size_t first, int32_t* panel);

  // One block of outputs for one tile: round(X) . W + bias in acc [block, tile], 64-byte aligned; of a weight
  // with a grid without the bias. Rows of outputs behind N hold anything.
  void (*multiply)(const Weight& weight, size_t block, const int32_t* panel, float* acc);

  // Four rows of `count` bytes to words with a byte of each, xored with `flip` and what this kernel's
  // products take.
  void (*interleave)(const unsigned char* const* rows, size_t count, int32_t flip, int32_t* words);
  int32_t middle;  // what they take: xored to every byte of a panel

  // One block of outputs for one tile, as bytes: y in the first `tile` bytes of each row of acc [block,
  // tile], 64-byte aligned. The panel needs no rows behind its quads.
  void (*multiply_bytes)(const Weight& weight, size_t block, const ByteSteps& steps, const int32_t* panel,
                         float* acc);

  // Round the first `channels` rows of such a block to the weight's grid, and add the bias.
  void (*settle)(const Weight& weight, size_t block, size_t channels, float* acc);

  // `size` numbers in place; as many as a vector has may be touched behind them.
  void (*activate)(Activation activation, float* data, size_t size);

  // acc [channels, tile] to the first `tokens` rows of `y`, which are `stride` floats apart: y[t, n] = acc[n,
  // t].
  void (*store_tokens)(const float* acc, size_t channels, size_t tokens, size_t stride, float* y);

  // extremes [kExtremes, tile] of `count` rows of floats [count, tile].
  void (*find_extremes)(const float* rows, size_t count, float* extremes);

  // Quads begin..end-1 of a panel for `weight` of such rows [weight.K, tile], as `round` makes it of tokens;
  // the first ones come with what the panel has behind its quads. `extremes` [blocks, kExtremes, tile] are
  // those of all rows.
  void (*round_rows)(const Weight& weight, const float* rows, const float* extremes, size_t blocks,
                     size_t begin, size_t end, int32_t* panel);
};

}  // namespace sparse_ops::quads
