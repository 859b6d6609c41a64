// One or two tokens, where a stored weight cannot multiply a vector of tokens: vectors of entries instead.
// The activations of one chunk are held in eight registers a token, and permutations fetch those that sixteen
// offsets name.
//
// For AVX-512. Everything has internal linkage, as in vector.h.
#pragma once

#include <immintrin.h>

#include "kernels/spmm/generic.h"

namespace sparse_ops::spmm {
namespace {
namespace lookup {

constexpr size_t kTableVectors = 8;
constexpr size_t kMaxChunk = 16 * kTableVectors;
constexpr size_t kMaxBlock = 256;

inline __mmask16 first_lanes(size_t count) {
  return static_cast<__mmask16>(count < 16 ? (1u << count) - 1 : 0xffffu);
}

// table[t][k] = x[k, t] of x [count, kTokens], k < kMaxChunk; zeros behind it.
template <size_t kTokens>
inline void load_tables(const float* x, size_t count, __m512 (*table)[kTableVectors]) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
  count = count < kMaxChunk ? count * kTokens : kMaxChunk * kTokens;
  const auto vector = [&](size_t i) {
    return 16 * i < count ? _mm512_maskz_loadu_ps(first_lanes(count - 16 * i), x + 16 * i)
                          : _mm512_setzero_ps();
  };
#pragma GCC unroll 8
  for (size_t i = 0; i < kTableVectors; ++i) {
    if constexpr (kTokens == 1) {
      table[0][i] = vector(i);
    } else {
      const __m512 low = vector(2 * i), high = vector(2 * i + 1);
      table[0][i] = _mm512_permutex2var_ps(low, even, high);
      table[1][i] = _mm512_permutex2var_ps(low, odd, high);
    }
  }
}

// table[index], index < kMaxChunk
inline __m512 fetch(const __m512* table, __m512i index) {
  const __mmask16 bit5 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
  const __mmask16 bit6 = _mm512_test_epi32_mask(index, _mm512_set1_epi32(64));
  const __m512 a = _mm512_permutex2var_ps(table[0], index, table[1]);  // each looks at the low five bits
  const __m512 b = _mm512_permutex2var_ps(table[2], index, table[3]);
  const __m512 c = _mm512_permutex2var_ps(table[4], index, table[5]);
  const __m512 d = _mm512_permutex2var_ps(table[6], index, table[7]);
  return _mm512_mask_blend_ps(bit6, _mm512_mask_blend_ps(bit5, a, b), _mm512_mask_blend_ps(bit5, c, d));
}

template <size_t kTokens>
void transpose(const float* x, size_t tokens, size_t K, size_t begin, size_t end, float* panel) {
  for (size_t t = 0; t < kTokens; ++t) {
    for (size_t k = begin; k < end; ++k) panel[k * kTokens + t] = t < tokens ? x[t * K + k] : 0.0f;
  }
}

template <size_t kTokens>
void multiply(const Weight& w, size_t block, const float* panel, float* sums) {
  alignas(64) float acc[kMaxBlock * kTokens * 16];  // sixteen partial sums of each token and output channel
  for (size_t n = 0; n < w.block * kTokens || n % 16 != 0; ++n)
    _mm512_store_ps(acc + n * 16, _mm512_setzero_ps());
  const size_t first = block * w.block;
  const float* loaded = nullptr;
  __m512 table[kTokens][kTableVectors] = {};
  for_each_segment<kTokens, 1>(
      w, block, panel,
      [&](const float* x, const uint8_t* offsets, const unsigned char* values, size_t left, size_t row) {
        if (x != loaded) {
          load_tables<kTokens>(x, w.K - static_cast<size_t>(x - panel) / kTokens, table);
          loaded = x;
        }
        float* to = acc + row * kTokens * 16;
        __m512 sum[kTokens];
#pragma GCC unroll 2
        for (size_t t = 0; t < kTokens; ++t) sum[t] = _mm512_load_ps(to + t * 16);
        for (; left >= 16; left -= 16) {
          __builtin_prefetch(values + kAhead);
          const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(offsets));
          const __m512i index = _mm512_maskz_cvtepu8_epi32(0xffff, bytes);
          const __m512 weights = _mm512_loadu_ps(values);
#pragma GCC unroll 2
          for (size_t t = 0; t < kTokens; ++t)
            sum[t] = _mm512_fmadd_ps(fetch(table[t], index), weights, sum[t]);
          offsets += 16;
          values += 64;
        }
        if (left > 0) {
          __builtin_prefetch(values + kAhead);
          const __mmask16 lanes = first_lanes(left);
          const __m512i index = _mm512_maskz_cvtepu8_epi32(lanes, _mm_maskz_loadu_epi8(lanes, offsets));
          const __m512 weights = _mm512_maskz_loadu_ps(lanes, values);
#pragma GCC unroll 2
          for (size_t t = 0; t < kTokens; ++t) {
            sum[t] = _mm512_mask3_fmadd_ps(fetch(table[t], index), weights, sum[t], lanes);
          }
        }
#pragma GCC unroll 2
        for (size_t t = 0; t < kTokens; ++t) _mm512_store_ps(to + t * 16, sum[t]);
      });
  const size_t channels = w.N - first < w.block ? w.N - first : w.block;
  for (size_t n = 0; n < kTokens * channels; n += 16) {  // sums [channel][token]
    Vector<16> square[16];
    for (size_t i = 0; i < 16; ++i) square[i] = load<16>(acc + (n + i) * 16);
    transpose_square<16>(square);
    for (size_t i = 1; i < 16; ++i) square[0] += square[i];
    store<16>(sums + n, square[0]);
  }
  for (size_t n = 0; n < channels; ++n) {
    for (size_t t = 0; t < kTokens; ++t) sums[n * kTokens + t] += load_float(w.bias + 4 * (first + n));
  }
}

template <size_t kTokens>
void store_tokens(const float* acc, size_t channels, size_t tokens, size_t stride, float* y) {
  for (size_t t = 0; t < tokens; ++t) {
    for (size_t n = 0; n < channels; ++n) y[t * stride + n] = acc[n * kTokens + t];
  }
}

// `kTokens` one or two.
template <size_t kTokens>
constexpr Kernel make_kernel(const KernelRow& row) {
  return {agreed(row, 16, kTokens), kMaxChunk, 1, 1, transpose<kTokens>, multiply<kTokens>, activate<16>,
          store_tokens<kTokens>};
}

}  // namespace lookup
}  // namespace
}  // namespace sparse_ops::spmm
