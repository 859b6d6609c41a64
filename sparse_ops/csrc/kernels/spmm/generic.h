// The kernel's body for any vector width and tile. Included by one source file per instruction set.
#pragma once

#include "kernels/activations.h"
#include "kernels/spmm/accumulate.h"
#include "kernels/spmm/kernel.h"
#include "kernels/vector.h"

namespace sparse_ops::spmm {
namespace {

template <size_t kLanes>
void activate(Activation activation, float* data, size_t size) {
  switch (activation) {
    case Activation::none:
      return;
    case Activation::relu:
      return apply<kLanes, relu<kLanes>>(data, size);
    case Activation::gelu:
      return apply<kLanes, gelu<kLanes>>(data, size);
    case Activation::gelu_tanh:
      return apply<kLanes, gelu_tanh<kLanes>>(data, size);
    case Activation::silu:
      return apply<kLanes, silu<kLanes>>(data, size);
    case Activation::quick_gelu:
      return apply<kLanes, quick_gelu<kLanes>>(data, size);
  }
}

// y[t * stride + c] = acc[c * kTile + t] for c = begin..end - 1: kVectors vectors of channels at a time
template <size_t kLanes, size_t kTile, size_t kVectors>
inline void store_columns(const float* acc, size_t begin, size_t end, size_t tokens, size_t stride,
                          float* y) {
  for (size_t t = 0; t < tokens; t += 4) {
    for (size_t c = begin; c < end; c += kVectors * kLanes) {
      Vector<kLanes> columns[kVectors][4];
#pragma GCC unroll 2
      for (size_t v = 0; v < kVectors; ++v) {
        load_columns<kLanes>(acc + (c + v * kLanes) * kTile + t, kTile, columns[v]);
      }
#pragma GCC unroll 4
      for (size_t i = 0; i < 4; ++i) {
        if (t + i == tokens) break;
#pragma GCC unroll 2
        for (size_t v = 0; v < kVectors; ++v) {
          store<kLanes>(y + (t + i) * stride + c + v * kLanes, columns[v][i]);
        }
      }
    }
  }
}

// Four tokens at a time, and of each a whole cache line before the next: rows of y often lie a multiple of
// 4 KiB apart, and then compete for the same few lines of the first-level cache.
template <size_t kLanes, size_t kTile>
void store_tokens(const float* acc, size_t channels, size_t tokens, size_t stride, float* y) {
  constexpr size_t kWidth =
      kLanes > 8 ? 8 : kLanes;  // wider vectors are not faster: they take more exchanges
  const size_t pairs = channels - channels % (2 * kWidth), whole = channels - channels % kWidth;
  store_columns<kWidth, kTile, 2>(acc, 0, pairs, tokens, stride, y);
  store_columns<kWidth, kTile, 1>(acc, pairs, whole, tokens, stride, y);
  for (size_t n = whole; n < channels; ++n) {
    for (size_t t = 0; t < tokens; ++t) y[t * stride + n] = acc[n * kTile + t];
  }
}

template <size_t kLanes, size_t kVectors>
void transpose(const float* x, size_t tokens, size_t K, size_t begin, size_t end, float* panel) {
  constexpr size_t kTile = kLanes * kVectors;
  const size_t whole = end - (end - begin) % kLanes;
  for (size_t t = 0; t < kTile;
       t += kLanes) {  // few rows of x at a time: far rows compete for the same cache sets
    for (size_t k = begin; k < whole; k += kLanes) {
      Vector<kLanes> square[kLanes];
#pragma GCC unroll 16
      for (size_t i = 0; i < kLanes; ++i) {
        square[i] = t + i < tokens ? load<kLanes>(x + (t + i) * K + k) : Vector<kLanes>{};
      }
      transpose_square<kLanes>(square);
#pragma GCC unroll 16
      for (size_t i = 0; i < kLanes; ++i) store<kLanes>(panel + (k + i) * kTile + t, square[i]);
    }
  }
  for (size_t k = whole; k < end; ++k) {
    for (size_t t = 0; t < kTile; ++t) panel[k * kTile + t] = t < tokens ? x[t * K + k] : 0.0f;
  }
}

template <size_t kLanes, size_t kVectors, size_t kSets>
constexpr Kernel make_kernel(const KernelRow& row) {
  return {agreed(row, kLanes, kLanes * kVectors),
          255,
          8,
          vectors_at_a_time<kVectors, 4>(),
          transpose<kLanes, kVectors>,
          multiply<kLanes, kVectors, kSets>,
          activate<kLanes>,
          store_tokens<kLanes, kLanes * kVectors>};
}

}  // namespace
}  // namespace sparse_ops::spmm
