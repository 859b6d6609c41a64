// One token, where a stored weight cannot multiply a vector of tokens: vectors of entries instead. The
// activations of one chunk are held in eight registers, and a permutation fetches those that sixteen offsets
// name.
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

// The first min(count, kMaxChunk) elements of x, then zeros.
inline void load_table(const float* x, size_t count, __m512* table) {
  for (size_t i = 0; i < kTableVectors; ++i) {
    table[i] =
        16 * i < count ? _mm512_maskz_loadu_ps(first_lanes(count - 16 * i), x + 16 * i) : _mm512_setzero_ps();
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

void transpose(const float* x, size_t, size_t, size_t begin, size_t end, float* panel) {
  __builtin_memcpy(panel + begin, x + begin, (end - begin) * sizeof(float));
}

void multiply(const Weight& w, size_t block, const float* panel, float* sums) {
  alignas(64) float acc[kMaxBlock * 16];  // sixteen partial sums of each output channel
  for (size_t n = 0; n < w.block || n % 16 != 0; ++n) _mm512_store_ps(acc + n * 16, _mm512_setzero_ps());
  const size_t first = block * w.block;
  const float* loaded = nullptr;
  __m512 table[kTableVectors] = {};
  for_each_segment<1, 1>(
      w, block, panel,
      [&](const float* x, const uint8_t* offsets, const unsigned char* values, size_t left, size_t row) {
        if (x != loaded) {
          load_table(x, w.K - static_cast<size_t>(x - panel), table);
          loaded = x;
        }
        float* to = acc + row * 16;
        __m512 sum = _mm512_load_ps(to);
        for (; left >= 16; left -= 16) {
          __builtin_prefetch(values + kAhead);
          const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(offsets));
          const __m512i index = _mm512_maskz_cvtepu8_epi32(0xffff, bytes);
          sum = _mm512_fmadd_ps(fetch(table, index), _mm512_loadu_ps(values), sum);
          offsets += 16;
          values += 64;
        }
        if (left > 0) {
          __builtin_prefetch(values + kAhead);
          const __mmask16 lanes = first_lanes(left);
          const __m512i index = _mm512_maskz_cvtepu8_epi32(lanes, _mm_maskz_loadu_epi8(lanes, offsets));
          sum = _mm512_mask3_fmadd_ps(fetch(table, index), _mm512_maskz_loadu_ps(lanes, values), sum, lanes);
        }
        _mm512_store_ps(to, sum);
      });
  const size_t channels = w.N - first < w.block ? w.N - first : w.block;
  for (size_t n = 0; n < channels; n += 16) {
    Vector<16> square[16];
    for (size_t i = 0; i < 16; ++i) square[i] = load<16>(acc + (n + i) * 16);
    transpose_square<16>(square);
    for (size_t i = 1; i < 16; ++i) square[0] += square[i];
    store<16>(sums + n, square[0]);
  }
  for (size_t n = 0; n < channels; ++n) sums[n] += load_float(w.bias + 4 * (first + n));
}

void store_tokens(const float* acc, size_t channels, size_t, size_t, float* y) {
  __builtin_memcpy(y, acc, channels * sizeof(float));
}

}  // namespace lookup
}  // namespace
}  // namespace sparse_ops::spmm
