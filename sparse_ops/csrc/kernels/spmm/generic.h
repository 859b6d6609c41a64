// The kernel's body for any vector width and tile. Included by one source file per instruction set.
#pragma once

#include "kernels/activations.h"
#include "kernels/spmm/kernel.h"
#include "kernels/vector.h"

namespace sparse_ops::spmm {
namespace {

// sum += w * row[tile]
template <size_t kLanes, size_t kVectors>
inline void add_entry(Vector<kLanes>* sum, const float* row, const unsigned char* value) {
  const Vector<kLanes> w = splat<kLanes>(load_float(value));
#pragma GCC unroll 16
  for (size_t v = 0; v < kVectors; ++v) sum[v] += w * load<kLanes>(row + v * kLanes);
}

// acc[tile] += one segment. kSets independent sums per vector hide the latency of the multiply-add.
template <size_t kLanes, size_t kVectors, size_t kSets>
inline void add_segment(const float* x, const uint8_t* offsets, const unsigned char* values, size_t count,
                        float* acc) {
  constexpr size_t kTile = kLanes * kVectors;
  Vector<kLanes> sum[kSets][kVectors];
#pragma GCC unroll 16
  for (size_t v = 0; v < kVectors; ++v) {
    sum[0][v] = load<kLanes>(acc + v * kLanes);
#pragma GCC unroll 16
    for (size_t s = 1; s < kSets; ++s) sum[s][v] = Vector<kLanes>{};
  }
  size_t i = 0;
  for (; i + 4 <= count; i += 4) {
    uint32_t four;  // the offsets of four entries at the price of one load
    __builtin_memcpy(&four, offsets + i, sizeof(four));
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; ++j) {
      const size_t shift = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? 8 * j : 24 - 8 * j;
      add_entry<kLanes, kVectors>(sum[j % kSets], x + ((four >> shift) & 255) * kTile, values + 4 * (i + j));
    }
  }
#pragma GCC unroll 4
  for (size_t j = 0; j < 3; ++j) {
    if (i + j == count) break;
    add_entry<kLanes, kVectors>(sum[j % kSets], x + offsets[i + j] * kTile, values + 4 * (i + j));
  }
#pragma GCC unroll 16
  for (size_t v = 0; v < kVectors; ++v) {
#pragma GCC unroll 16
    for (size_t s = 1; s < kSets; ++s) sum[0][v] += sum[s][v];
    store<kLanes>(acc + v * kLanes, sum[0][v]);
  }
}

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
  }
}

template <size_t kLanes, size_t kTile>
void store_tokens(const float* acc, size_t channels, size_t tokens, size_t stride, float* y) {
  const size_t whole = channels - channels % kLanes;
  for (size_t t = 0; t < tokens;
       t += kLanes) {  // few rows of y at a time: far rows compete for the same cache sets
    for (size_t n = 0; n < whole; n += kLanes) {
      Vector<kLanes> square[kLanes];
#pragma GCC unroll 16
      for (size_t i = 0; i < kLanes; ++i) square[i] = load<kLanes>(acc + (n + i) * kTile + t);
      transpose_square<kLanes>(square);
#pragma GCC unroll 16
      for (size_t i = 0; i < kLanes; ++i) {
        if (t + i < tokens) store<kLanes>(y + (t + i) * stride + n, square[i]);
      }
    }
  }
  for (size_t n = whole; n < channels; ++n) {
    for (size_t t = 0; t < tokens; ++t) y[t * stride + n] = acc[n * kTile + t];
  }
}

template <size_t kLanes, size_t kVectors, size_t kSets>
void multiply(const Weight& w, size_t block, const float* panel, float* acc) {
  constexpr size_t kTile = kLanes * kVectors;
  // Short segments overlap in the processor by themselves: fewer sums are quicker to add up.
  constexpr size_t kShortSets = kSets > 2 ? kSets / 2 : 1;
  constexpr size_t kLong = 24;
  const size_t first = block * w.block;
  const size_t channels = w.N - first < w.block ? w.N - first : w.block;
  for (size_t n = 0; n < w.block; ++n) {
    const Vector<kLanes> bias = splat<kLanes>(n < channels ? load_float(w.bias + 4 * (first + n)) : 0.0f);
    for (size_t v = 0; v < kVectors; ++v) store<kLanes>(acc + n * kTile + v * kLanes, bias);
  }
  const unsigned char* values = w.values + 4 * w.block_entries[block];
  const uint8_t* offsets = w.offsets + w.block_entries[block];
  const uint8_t* counts = w.counts + w.chunks * first;
  const uint8_t* rows = w.rows + w.chunks * first;
  for (size_t c = 0; c < w.chunks; ++c) {
    const float* x = panel + c * w.chunk * kTile;
    for (size_t s = 0; s < w.block; ++s) {
      const size_t count = *counts++;
      float* sum = acc + *rows++ * kTile;
      if (count >= kLong) {
        add_segment<kLanes, kVectors, kSets>(x, offsets, values, count, sum);
      } else {
        add_segment<kLanes, kVectors, kShortSets>(x, offsets, values, count, sum);
      }
      offsets += count;
      values += 4 * count;
    }
  }
}

template <size_t kLanes, size_t kVectors>
void transpose(const float* x, size_t tokens, size_t K, size_t begin, size_t end, float* panel) {
  constexpr size_t kTile = kLanes * kVectors;
  const size_t whole = end - (end - begin) % kLanes;
  for (size_t k = begin; k < whole; k += kLanes) {
    for (size_t t = 0; t < kTile; t += kLanes) {
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

template <size_t kLanes>
double peak(size_t steps) {
  constexpr size_t kChains = 12;
  Vector<kLanes> sum[kChains];
  const Vector<kLanes> factor = splat<kLanes>(0.5f), term = splat<kLanes>(0.25f);
#pragma GCC unroll 16
  for (size_t c = 0; c < kChains; ++c) sum[c] = splat<kLanes>(static_cast<float>(c));
  for (size_t i = 0; i < steps; ++i) {
#pragma GCC unroll 16
    for (size_t c = 0; c < kChains; ++c) sum[c] = sum[c] * factor + term;
  }
#pragma GCC unroll 16
  for (size_t c = 1; c < kChains; ++c) sum[0] += sum[c];
  [[maybe_unused]] volatile float keep = sum[0][0];
  return 2.0 * kLanes * kChains * static_cast<double>(steps);
}

template <size_t kLanes, size_t kVectors, size_t kSets>
constexpr Kernel make_kernel(const char* name, Isa isa) {
  return {name,
          isa,
          kLanes * kVectors,
          255,
          transpose<kLanes, kVectors>,
          multiply<kLanes, kVectors, kSets>,
          activate<kLanes>,
          store_tokens<kLanes, kLanes * kVectors>,
          peak<kLanes>};
}

}  // namespace
}  // namespace sparse_ops::spmm
