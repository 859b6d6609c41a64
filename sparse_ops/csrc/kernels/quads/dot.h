// The instructions that differ between processors: rounding floats to bytes, and sums of four products of
// bytes. Included by round.h and accumulate.h.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/vector.h"
#if defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace sparse_ops::quads {
namespace {

// To the nearest, ties to even.
inline int32_t round_one(float x) {
#if defined(__SSE2__)
  return _mm_cvtss_si32(_mm_set_ss(x));
#elif defined(__aarch64__)
  return vcvtns_s32_f32(x);
#else
  return static_cast<int32_t>(__builtin_nearbyintf(x));
#endif
}

// What is xored to every byte of a panel: products of signed bytes take the activations less 128.
#if defined(__ARM_FEATURE_DOTPROD)
constexpr int32_t kMiddle = 128;
#else
constexpr int32_t kMiddle = 0;
#endif
constexpr int32_t kMiddleBytes = static_cast<int32_t>(static_cast<uint32_t>(kMiddle) * 0x01010101u);

// to[i] = min(round(x[i] * inverse) + zero, 255) for kAtOnce numbers; what is there for NaN does not matter.
#if defined(__AVX512F__)
constexpr size_t kAtOnce = 64;
inline void round_bytes(const float* x, float inverse, int32_t zero, unsigned char* to) {
  const __m512 factor = _mm512_set1_ps(inverse);
  __m512i steps[4];
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i) {
    steps[i] = _mm512_maskz_cvtps_epi32(0xffff, _mm512_mul_ps(_mm512_loadu_ps(x + 16 * i), factor));
  }
  const __m512i shift = _mm512_set1_epi16(static_cast<int16_t>(zero));
  const __m512i low = _mm512_add_epi16(_mm512_packs_epi32(steps[0], steps[1]), shift);
  const __m512i high = _mm512_add_epi16(_mm512_packs_epi32(steps[2], steps[3]), shift);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i bytes = _mm512_maskz_permutexvar_epi32(0xffff, order, _mm512_packus_epi16(low, high));
  _mm512_storeu_si512(to, bytes);
}
#elif defined(__AVX2__)
constexpr size_t kAtOnce = 32;
inline void round_bytes(const float* x, float inverse, int32_t zero, unsigned char* to) {
  const __m256 factor = _mm256_set1_ps(inverse);
  __m256i steps[4];
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i) {
    steps[i] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + 8 * i), factor));
  }
  const __m256i shift = _mm256_set1_epi16(static_cast<int16_t>(zero));
  const __m256i low = _mm256_add_epi16(_mm256_packs_epi32(steps[0], steps[1]), shift);
  const __m256i high = _mm256_add_epi16(_mm256_packs_epi32(steps[2], steps[3]), shift);
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), bytes);
}
#elif defined(__SSE2__)
constexpr size_t kAtOnce = 16;
inline void round_bytes(const float* x, float inverse, int32_t zero, unsigned char* to) {
  const __m128 factor = _mm_set1_ps(inverse);
  __m128i steps[4];
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i) steps[i] = _mm_cvtps_epi32(_mm_mul_ps(_mm_loadu_ps(x + 4 * i), factor));
  const __m128i shift = _mm_set1_epi16(static_cast<int16_t>(zero));
  const __m128i low = _mm_add_epi16(_mm_packs_epi32(steps[0], steps[1]), shift);
  const __m128i high = _mm_add_epi16(_mm_packs_epi32(steps[2], steps[3]), shift);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(low, high));
}
#else
constexpr size_t kAtOnce = 4;
inline void round_bytes(const float* x, float inverse, int32_t zero, unsigned char* to) {
  for (size_t i = 0; i < kAtOnce; ++i) {
    const int32_t q = round_one(x[i] * inverse) + zero;
    to[i] = static_cast<unsigned char>((q > 255 ? 255 : q < 0 ? 0 : q) ^ kMiddle);
  }
}
#endif

// zero * sum in two products of 16 bits: |sum| < 2^22 as its lowest 7 bits and the rest, zero < 256 beside
// 128 zero.
#if defined(__SSE2__)
inline int32_t zero_word(int32_t zero) { return zero | zero << 23; }
inline int32_t sum_word(int32_t sum) {
  return static_cast<int32_t>((static_cast<uint32_t>(sum) & 127) | static_cast<uint32_t>(sum >> 7) << 16);
}
#else
inline int32_t zero_word(int32_t zero) { return zero - kMiddle; }
inline int32_t sum_word(int32_t sum) { return sum; }
#endif

template <size_t kLanes>
inline IntVector<kLanes> splat_word(int32_t word) {
  return word - IntVector<kLanes>{};
}

// To the nearest, ties to even, of numbers within +-2^21.
template <size_t kLanes>
inline IntVector<kLanes> round_words(Vector<kLanes> x) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) return (IntVector<16>)_mm512_maskz_cvtps_epi32(0xffff, x);
#endif
#if defined(__AVX2__)
  if constexpr (kLanes == 8) return (IntVector<8>)_mm256_cvtps_epi32(x);
#endif
  // A float of that size has no fraction: what is added to it is rounded, and stands in its lowest bits.
  const Vector<kLanes> moved = x + splat<kLanes>(12582912.0f);  // 3 * 2^22
  IntVector<kLanes> words;
  __builtin_memcpy(&words, &moved, sizeof(words));
  return words - 0x4b400000;
}

template <size_t kLanes>
struct BytesOf {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes)));
};

// kLanes bytes as words. Compilers make conversions of vectors in many steps.
template <size_t kLanes>
inline IntVector<kLanes> load_bytes(const unsigned char* from) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return (IntVector<16>)_mm512_maskz_cvtepu8_epi32(0xffff, bytes);
  }
#endif
#if defined(__AVX2__)
  if constexpr (kLanes == 8) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return (IntVector<8>)_mm256_cvtepu8_epi32(bytes);
  }
#endif
  typename BytesOf<kLanes>::Bytes bytes;
  __builtin_memcpy(&bytes, from, sizeof(bytes));
  return __builtin_convertvector(bytes, IntVector<kLanes>);
}

// The lowest byte of each word.
template <size_t kLanes>
inline void store_low_bytes(IntVector<kLanes> words, unsigned char* to) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) {
    const __m128i bytes = _mm512_maskz_cvtepi32_epi8(0xffff, (__m512i)words);
    return _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
  }
#endif
#if defined(__AVX2__)
  if constexpr (kLanes == 8) {
    const __m256i low = _mm256_and_si256((__m256i)words, _mm256_set1_epi32(255));
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    return _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(halves, halves));
  }
#endif
  const auto bytes = __builtin_convertvector(words, typename BytesOf<kLanes>::Bytes);
  __builtin_memcpy(to, &bytes, sizeof(bytes));
}

// The lowest bytes of four vectors of words, one vector behind the other; `words` are within +-2^15.
template <size_t kLanes>
inline void store_low_bytes_of_four(const IntVector<kLanes>* words, unsigned char* to) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) {
    const __m512i low = _mm512_set1_epi16(255);
    const auto halves = [&](size_t i) {
      return _mm512_and_si512(_mm512_packs_epi32((__m512i)words[i], (__m512i)words[i + 1]), low);
    };
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m512i bytes = _mm512_packus_epi16(halves(0), halves(2));
    return _mm512_storeu_si512(to, _mm512_maskz_permutexvar_epi32(0xffff, order, bytes));
  }
#elif defined(__AVX2__)
  if constexpr (kLanes == 8) {
    const __m256i low = _mm256_set1_epi16(255);
    const auto halves = [&](size_t i) {
      return _mm256_and_si256(_mm256_packs_epi32((__m256i)words[i], (__m256i)words[i + 1]), low);
    };
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    const __m256i bytes = _mm256_packus_epi16(halves(0), halves(2));
    return _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutevar8x32_epi32(bytes, order));
  }
#endif
  for (size_t v = 0; v < 4; ++v) store_low_bytes<kLanes>(words[v], to + v * kLanes);
}

// Products of 16-bit halves of words, added.
#if defined(__SSE2__)
template <size_t kLanes>
inline IntVector<kLanes> add_halves(IntVector<kLanes> a, IntVector<kLanes> b) {
#if defined(__AVX512BW__)
  if constexpr (kLanes == 16) return (IntVector<16>)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#endif
#if defined(__AVX2__)
  if constexpr (kLanes == 8) return (IntVector<8>)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#endif
  if constexpr (kLanes == 4) return (IntVector<4>)_mm_madd_epi16((__m128i)a, (__m128i)b);
}
#endif

// What a zero point adds to a sum: zero_word(zero) times sum_word(sum).
template <size_t kLanes>
inline IntVector<kLanes> shift_of(IntVector<kLanes> zeros, IntVector<kLanes> sums) {
#if defined(__SSE2__)
  return add_halves<kLanes>(zeros, sums);
#else
  return zeros * sums;
#endif
}

// Compilers change the order of integer sums, and then need more registers than there are: not across this.
template <size_t kLanes>
inline IntVector<kLanes> as_it_is(IntVector<kLanes> sum) {
#if defined(__AVX512F__)
  asm("" : "+v"(sum));
#elif defined(__SSE2__)
  asm("" : "+x"(sum));
#endif
  return sum;
}

// A quad of weights, ready to be multiplied. With kWide its integers may use all 8 bits.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
constexpr bool kAnyIsNarrow = true;  // sums of bytes are made in 32 bits
template <size_t kLanes, bool kWide>
struct Quad {
  IntVector<kLanes> weights;
  explicit Quad(int32_t word) : weights(splat_word<kLanes>(word)) {}
  IntVector<kLanes> add_to(IntVector<kLanes> sum, IntVector<kLanes> x) const {
#if defined(__AVX512VNNI__)
    return (IntVector<kLanes>)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, (__m512i)weights);
#elif defined(__AVXVNNI__)
    return (IntVector<kLanes>)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, (__m256i)weights);
#else
    return (IntVector<kLanes>)vdotq_s32((int32x4_t)sum, (int8x16_t)x, (int8x16_t)weights);
#endif
  }
};
#else
constexpr bool kAnyIsNarrow = false;
// The bytes of words as 16-bit numbers: the first and third, and the others.
template <size_t kLanes>
inline IntVector<kLanes> even_bytes(IntVector<kLanes> x) {
  return x & 0x00ff00ff;
}
template <size_t kLanes>
inline IntVector<kLanes> odd_bytes(IntVector<kLanes> x) {
  return (x >> 8) & 0x00ff00ff;
}
// The same of signed bytes.
template <size_t kLanes>
struct HalvesOf {
  typedef int16_t Halves __attribute__((vector_size(kLanes * 4)));
};
template <size_t kLanes>
inline IntVector<kLanes> odd_weights(IntVector<kLanes> words) {
  using Halves = typename HalvesOf<kLanes>::Halves;
  return (IntVector<kLanes>)((Halves)words >> 8);
}
template <size_t kLanes>
inline IntVector<kLanes> even_weights(IntVector<kLanes> words) {
  using Halves = typename HalvesOf<kLanes>::Halves;
  return odd_weights<kLanes>((IntVector<kLanes>)((Halves)words << 8));
}

template <size_t kLanes, bool kWide>
struct Quad {
#if defined(__SSE2__)
  IntVector<kLanes> even, odd;
  explicit Quad(int32_t word)
      : even(even_weights<kLanes>(splat_word<kLanes>(word))),
        odd(odd_weights<kLanes>(splat_word<kLanes>(word))) {}
  IntVector<kLanes> add_to(IntVector<kLanes> sum, IntVector<kLanes> x) const {
    return as_it_is<kLanes>(sum + add_halves<kLanes>(even_bytes<kLanes>(x), even) +
                            add_halves<kLanes>(odd_bytes<kLanes>(x), odd));
  }
#else
  IntVector<kLanes> weights[4];
  explicit Quad(int32_t word) {
    for (int i = 0; i < 4; ++i) weights[i] = splat_word<kLanes>(static_cast<int8_t>(word >> 8 * i));
  }
  IntVector<kLanes> add_to(IntVector<kLanes> sum, IntVector<kLanes> x) const {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum += ((x >> 8 * i) & 255) * weights[i];
    return sum;
  }
#endif
};
#if defined(__AVX2__)
// Pairs of products of bytes fit 16 bits where weights are in -64..64.
template <size_t kLanes>
struct Quad<kLanes, false> {
  IntVector<kLanes> weights;
  explicit Quad(int32_t word) : weights(splat_word<kLanes>(word)) {}
  IntVector<kLanes> add_to(IntVector<kLanes> sum, IntVector<kLanes> x) const {
#if defined(__AVX512BW__)
    const __m512i pairs = _mm512_maddubs_epi16((__m512i)x, (__m512i)weights);
#else
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)x, (__m256i)weights);
#endif
    return as_it_is<kLanes>(
        sum + add_halves<kLanes>((IntVector<kLanes>)pairs, splat_word<kLanes>(0x00010001)));
  }
};
#endif
#endif

}  // namespace
}  // namespace sparse_ops::quads
