// What one kernel for integers of few bits is: plain data, so that sources compiled for wide vectors may
// include it.
//
// Y[t, n] = act(H[t, n] + bias[n])
// H[t, n] = sum over groups g of  scale[g, n] * s[t, g] * sum over k in g of  q[t, k] * w[k, n]
//
// Outputs may be those of several linears, or of a gate and of what it multiplies, each in whole blocks.
// Weights w and rounded activations q are integers of at most 8 bits; the inner sum is exact in int32. A
// group is `group` inputs with one scale for each output, and one scale s of each token.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/row.h"
#include "kernels/spmm/kernel.h"

namespace sparse_ops::nbits {

using spmm::Activation;

constexpr size_t kBlock = 16;     // outputs that are stored and computed together
constexpr size_t kQuad = 4;       // inputs of one mask
constexpr size_t kSpan = 64;      // inputs of one piece of `n_of_16`
constexpr size_t kMaxRows = 8;    // tokens that share one pass over the weight
constexpr size_t kHighest = 127;  // of a rounded activation

// How the integers of a weight lie; see sparse_ops/formats/nbits.py.
enum class Layout : uint8_t { bitmap4, bitmap8, n_of_16 };

struct Weight {
  Layout layout;
  size_t K, N, group;
  size_t kept;            // of 16 inputs, in the layout n_of_16
  const uint8_t* masks;   // bitmap: 8 bytes for each quad of each block
  const uint8_t* values;  // block by block
  const uint8_t* values_end;
  const uint64_t* block_values;  // where in `values` each block begins
  const void* scales;            // float16, any alignment [blocks, groups, kBlock]
  // Of 4 bits: what stands for 0 [blocks, groups, kBlock]; nullptr: 8 in a bitmap, and integers with a sign
  // beside positions.
  const uint8_t* zeros;
  const unsigned char* bias;  // float32 [N], any alignment
  Activation activation;
  bool gated;  // Y = act(first half of the blocks of H + bias) * second half
};

// Rounded activations of at most kMaxRows tokens.
struct Rows {
  const int8_t* q;      // [rows, stride]
  size_t stride;        // a multiple of kSpan, zeros behind K
  const float* scales;  // [rows, groups]
  const int32_t* sums;  // of the integers [rows, groups]
  size_t rows;
};

struct Kernel : KernelRow {
  // Round K numbers to integers in -kHighest..kHighest, `group` at a time: scales are the largest magnitude
  // over kHighest, ties go to the even integer. A group with NaN or Inf gets zeros and the scale NaN.
  // `stride` integers are written, the last of them 0.
  void (*round)(const void* x, size_t K, size_t group, size_t stride, int8_t* q, float* scales,
                int32_t* sums);

  // H of blocks begin..end-1 for all rows: their outputs are the first of the rows of `y`, which are `stride`
  // floats apart.
  void (*run)(const Weight& weight, const Rows& rows, size_t begin, size_t end, float* y, size_t stride);

  // y = act(y + bias) for `size` neighbouring outputs; `bias` is float32 of any alignment.
  void (*finish)(Activation activation, const unsigned char* bias, float* y, size_t size);
};

}  // namespace sparse_ops::nbits
