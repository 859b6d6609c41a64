// Y = act(X . W + bias) in float32, W in the chunked_csc format (described in sparse_ops/sparse_matmul.py).
//
// A kernel works on tiles of `tile` tokens. X is first transposed, tile by tile, into panels [K, tile], so that one
// stored weight multiplies whole vectors of tokens. Then each (tile, block of output channels) is one independent
// task, which accumulates chunk by chunk and writes its part of Y with bias and activation applied.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu_features.h"

namespace sparse_ops::spmm {

enum class Activation { none, relu, gelu, gelu_tanh, silu };

// A weight whose arrays were checked (check.h). Nothing is owned, and `values` may have any alignment.
struct Weight {
  size_t K, N;
  size_t chunk, block;
  size_t chunks, blocks;  // K / chunk and N / block, rounded up
  const unsigned char* values;  // float32
  const uint8_t* offsets;
  const uint8_t* counts;
  const uint8_t* rows;
  const uint64_t* block_entries;  // [blocks] index of the first entry of each block
  const unsigned char* bias;      // float32 [N], any alignment
  Activation activation;
};

// The accumulators of one task live on the stack: tile * block may not exceed this.
constexpr size_t kMaxAccumulators = 16384;

struct Kernel {
  const char* name;
  Isa isa;
  size_t tile;  // tokens

  // Transpose `tokens` <= tile rows of `x` [tokens, K] into `panel` [K, tile]; missing tokens become zeros.
  void (*transpose)(const float* x, size_t tokens, size_t K, float* panel);

  // One block of output channels for one tile: rows 0..tokens-1 of `y` [tokens, N], columns of that block only.
  void (*multiply)(const Weight& weight, size_t block, const float* panel, size_t tokens, float* y);

  // Run about `steps` independent fused multiply-adds per accumulator in the kernel's vectors; returns the number
  // of floating-point operations done. For measuring what the machine could reach.
  double (*peak)(size_t steps);
};

}  // namespace sparse_ops::spmm
