// Integers of 8 bits are multiplied as magnitudes with activations that take over the signs: two products fit
// 16 bits, so nothing saturates. Inputs are picked by a shuffle within 16 of them; zeros are put back between
// the integers of a bitmap eight at a time, by a shuffle from a table.

#include "kernels/nbits/expand.h"
#include "kernels/nbits/generic.h"
#include "kernels/nbits/table.h"

namespace sparse_ops::nbits {
namespace {

constexpr size_t kHalves = 2;       // vectors of a quad: eight outputs each

inline __m256i load_bytes(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

inline __m256i broadcast_quad(const int8_t* q) {
  int32_t four;
  __builtin_memcpy(&four, q, sizeof four);
  return _mm256_set1_epi32(four);
}

template <size_t kRows>
struct Accumulators {
  __m256i exact[kRows][kHalves];
  __m256 sums[kRows][kHalves];

  void start() {
    for (size_t r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = _mm256_setzero_ps();
    clear();
  }
  void clear() {
#pragma GCC unroll 8
    for (size_t r = 0; r < kRows; ++r) exact[r][0] = exact[r][1] = _mm256_setzero_si256();
  }
  // Of integers in -128..127 and inputs that are never -128.
  void add_signed(size_t r, size_t half, __m256i magnitudes, __m256i integers, __m256i inputs) {
    add_pairs(r, half, _mm256_maddubs_epi16(magnitudes, _mm256_sign_epi8(inputs, integers)));
  }
  void add_pairs(size_t r, size_t half, __m256i pairs) {
    exact[r][half] = _mm256_add_epi32(exact[r][half], _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  // surplus(r, h): what the sums of a token hold too much; the scales are `factor` times the right ones
  template <class Surplus>
  void finish(const Rows& x, size_t groups, const char* scales, size_t g, float factor, Surplus surplus) {
    alignas(32) float scale[kBlock];
    for (size_t j = 0; j < kBlock; ++j) {
      uint16_t half;
      __builtin_memcpy(&half, scales + (g * kBlock + j) * sizeof half, sizeof half);
      scale[j] = widened(half) * factor;
    }
#pragma GCC unroll 8
    for (size_t r = 0; r < kRows; ++r) {
      const __m256 own = _mm256_set1_ps(x.scales[r * groups + g]);
#pragma GCC unroll 2
      for (size_t h = 0; h < kHalves; ++h) {
        sums[r][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(exact[r][h], surplus(r, h))),
                                     _mm256_mul_ps(_mm256_load_ps(scale + 8 * h), own), sums[r][h]);
      }
    }
    clear();
  }
  void store(size_t count, float* y, size_t stride) const {
    Sums<kRows> all;
    for (size_t r = 0; r < kRows; ++r) {
      for (size_t h = 0; h < kHalves; ++h) _mm256_storeu_ps(all[r] + 8 * h, sums[r][h]);
    }
    store_sums<kRows>(all, count, y, stride);
  }
};

inline __m256i all_bytes(uint8_t value) { return _mm256_set1_epi8(static_cast<char>(value)); }

// What stands for 0 in eight outputs: in each, and in all bytes of it.
inline __m256i zero_of_each(const uint8_t* zeros) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros)));
}
inline __m256i in_all_bytes(__m256i each) { return _mm256_mullo_epi32(each, _mm256_set1_epi32(0x01010101)); }

// Half bytes become bytes, with the highest bit set.
inline void spread_halves(const uint8_t* values, uint8_t* to) {
  const __m256i low = all_bytes(15), kept = all_bytes(0x80), both = load_bytes(values);
  const __m256i first = _mm256_or_si256(_mm256_and_si256(both, low), kept),
                second = _mm256_or_si256(_mm256_and_si256(_mm256_srli_epi16(both, 4), low), kept);
  const __m256i a = _mm256_unpacklo_epi8(first, second), b = _mm256_unpackhi_epi8(first, second);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute2x128_si256(a, b, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32), _mm256_permute2x128_si256(a, b, 0x31));
}

// Eight outputs of a quad: the next integers, with zeros between them where the mask says so.
inline __m256i expanded(const uint8_t* mask, const uint8_t*& next) {
  __m128i parts[2];
  for (size_t i = 0; i < 2; ++i) {
    const unsigned a = mask[2 * i], b = mask[2 * i + 1];
    const uint8_t* second = next + __builtin_popcount(a);
    const __m128i one = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(next));
    const __m128i two = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(second));
    const __m128i of_one = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpansions.of[a]));
    const __m128i of_two = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpansions.of[b]));
    parts[i] = _mm_unpacklo_epi64(_mm_shuffle_epi8(one, of_one), _mm_shuffle_epi8(two, of_two));
    next = second + __builtin_popcount(b);
  }
  return _mm256_inserti128_si256(_mm256_castsi128_si256(parts[0]), parts[1], 1);
}

template <size_t kRows, bool kWide>
void run_bitmap(const Weight& w, const Rows& x, size_t begin, size_t end, float* y, size_t stride) {
  const size_t groups = groups_of(w), quads = (w.K + kQuad - 1) / kQuad, in_group = w.group / kQuad;
  // Of four bits, what stands for 0: in every output, and in all bytes of it.
  __m256i each[kHalves] = {_mm256_set1_epi32(8), _mm256_set1_epi32(8)};
  __m256i zero[kHalves] = {all_bytes(8), all_bytes(8)};
  Spread spread;
  for (size_t block = begin; block < end; ++block) {
    Accumulators<kRows> sums;
    sums.start();
    const uint8_t* values = w.values + w.block_values[block];
    const uint8_t* masks = w.masks + block * quads * 8;
    const char* scales = static_cast<const char*>(w.scales) + block * groups * kBlock * 2;
    for (size_t g = 0, first = 0; g < groups; ++g, first += in_group) {
      const size_t stop = in_group < quads - first ? first + in_group : quads;
      if (const uint8_t* zeros = kWide ? nullptr : zeros_of(w, block, g)) {
        for (size_t h = 0; h < kHalves; ++h) {
          each[h] = zero_of_each(zeros + 8 * h);
          zero[h] = in_all_bytes(each[h]);
        }
      }
      for (size_t part = first; part < stop; part += kQuadsAtOnce) {
        const size_t count = kQuadsAtOnce < stop - part ? kQuadsAtOnce : stop - part;
        values = spread.fill<kWide>(w, masks + part * 8, values, count, [](const uint8_t* from, uint8_t* to) {
          if constexpr (kWide) {
            for (size_t h = 0; h < kHalves; ++h) {
              _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 32 * h),
                                  _mm256_xor_si256(load_bytes(from + 32 * h), all_bytes(128)));
            }
          } else {
            spread_halves(from, to);
          }
        });
        for (size_t i = 0; i < count; ++i) {
          const uint8_t* next = spread.starts[i];
          const uint8_t* mask = masks + (part + i) * 8;
          const int8_t* q = x.q + (part + i) * kQuad;
#pragma GCC unroll 2
          for (size_t h = 0; h < kHalves; ++h) {
            const __m256i found = expanded(mask + 4 * h, next);
            const __m256i magnitudes =
                kWide ? _mm256_abs_epi8(found)
                      : _mm256_and_si256(_mm256_blendv_epi8(zero[h], found, found), all_bytes(0x7f));
#pragma GCC unroll 8
            for (size_t r = 0; r < kRows; ++r) {
              const __m256i inputs = broadcast_quad(q + r * x.stride);
              if constexpr (kWide) {
                sums.add_signed(r, h, magnitudes, found, inputs);
              } else {
                sums.add_pairs(r, h, _mm256_maddubs_epi16(magnitudes, inputs));
              }
            }
          }
        }
      }
      sums.finish(x, groups, scales, g, 1, [&](size_t r, size_t h) {
        return kWide ? _mm256_setzero_si256()
                     : _mm256_mullo_epi32(each[h], _mm256_set1_epi32(x.sums[r * groups + g]));
      });
    }
    sums.store(outputs_of(w, block), y + (block - begin) * kBlock, stride);
  }
}

template <size_t kRows, bool kZeros>
void run_positions(const Weight& w, const Rows& x, size_t begin, size_t end, float* y, size_t stride) {
  const size_t groups = groups_of(w), n = w.kept;
  const __m256i low = _mm256_set1_epi8(15);
  // Of the four integers of an output: for each sixteen inputs that they may be of, 0 where one is, else
  // 0x80.
  uint32_t others[16][kSpan / 16];
  for (size_t d = 0; d < n; ++d) {
    for (size_t s = 0; s < kSpan / 16; ++s) {
      others[d][s] = 0;
      for (size_t i = 0; i < kQuad; ++i) others[d][s] |= ((d * kQuad + i) / n == s ? 0u : 0x80u) << 8 * i;
    }
  }
  for (size_t block = begin; block < end; ++block) {
    Accumulators<kRows> sums;
    sums.start();
    const uint8_t* values = w.values + w.block_values[block];
    const char* scales = static_cast<const char*>(w.scales) + block * groups * kBlock * 2;
    for (size_t g = 0, k = 0; g < groups; ++g) {
      const size_t stop = k + w.group < w.K ? k + w.group : w.K;
      __m256i zero[kHalves];
      if constexpr (kZeros) {
        for (size_t h = 0; h < kHalves; ++h) zero[h] = in_all_bytes(zero_of_each(zeros_of(w, block, g) + 8 * h));
      }
      for (; k < stop; k += kSpan) {
        for (size_t d = 0; d < n; ++d, values += kBlock * kQuad) {
          __builtin_prefetch(values + kAhead);
          const size_t first = d * kQuad / n, final = (d * kQuad + kQuad - 1) / n;
#pragma GCC unroll 2
          for (size_t h = 0; h < kHalves; ++h) {
            const __m256i both = load_bytes(values + 32 * h), place = _mm256_and_si256(both, low);
            __m256i integers;
            if constexpr (kZeros) {
              integers = _mm256_sub_epi8(_mm256_and_si256(_mm256_srli_epi16(both, 4), low), zero[h]);
            } else {
              integers = _mm256_andnot_si256(low, both);  // 16 times
            }
            const __m256i magnitudes = _mm256_abs_epi8(integers);
#pragma GCC unroll 8
            for (size_t r = 0; r < kRows; ++r) {
              const int8_t* q = x.q + r * x.stride + k;
              const auto sixteen = [&](size_t s) {
                return _mm256_broadcastsi128_si256(
                    _mm_loadu_si128(reinterpret_cast<const __m128i*>(q + 16 * s)));
              };
              __m256i inputs;
              if (first == final) {
                inputs = _mm256_shuffle_epi8(sixteen(first), place);
              } else {
                inputs = _mm256_setzero_si256();
                for (size_t s = first; s <= final; ++s) {
                  const __m256i own =
                      _mm256_or_si256(place, _mm256_set1_epi32(static_cast<int32_t>(others[d][s])));
                  inputs = _mm256_or_si256(inputs, _mm256_shuffle_epi8(sixteen(s), own));
                }
              }
              sums.add_signed(r, h, magnitudes, integers, inputs);
            }
          }
        }
      }
      sums.finish(x, groups, scales, g, kZeros ? 1.0f : 1 / 16.0f,
                  [](size_t, size_t) { return _mm256_setzero_si256(); });
    }
    sums.store(outputs_of(w, block), y + (block - begin) * kBlock, stride);
  }
}

template <size_t kRows>
void run_n_of_16(const Weight& w, const Rows& x, size_t begin, size_t end, float* y, size_t stride) {
  if (w.zeros == nullptr) return run_positions<kRows, false>(w, x, begin, end, y, stride);
  return run_positions<kRows, true>(w, x, begin, end, y, stride);
}

template <size_t kRows, Layout kLayout>
struct Run {
  static constexpr auto run =
      kLayout == Layout::n_of_16 ? run_n_of_16<kRows> : run_bitmap<kRows, kLayout == Layout::bitmap8>;
};

}  // namespace

constexpr Kernel avx2 = {agreed(row::avx2, 8, kMaxRows), round_row<8>, run_any<Run>, finish<8>};

}  // namespace sparse_ops::nbits
