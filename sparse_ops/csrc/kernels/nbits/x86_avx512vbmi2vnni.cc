// Kept integers go to their places by one instruction (VPEXPANDB), inputs are picked by another (VPERMB), and
// four products are added by a third (VPDPBUSD). Its first factor is unsigned: the integers of a bitmap are
// stored with the middle of their range added, which is where nothing is kept, too, and the middle times the
// sum of all inputs is taken off; in the other layout inputs have 128 added, and 128 times the sum of the
// weights is taken off.

#include "kernels/nbits/generic.h"
#include "kernels/nbits/table.h"

namespace sparse_ops::nbits {
namespace {

// Intrinsics without a mask are made of undefined values in the headers of GCC 12, which it warns of.
constexpr __mmask16 kAll = 0xffff;
constexpr __mmask64 kAllBytes = ~__mmask64{0};
constexpr size_t kPrefetch = 2048;  // bytes ahead

inline __m512i all_bytes(uint8_t value) { return _mm512_set1_epi8(static_cast<char>(value)); }

inline __m512i broadcast_quad(const int8_t* q) {
  int32_t four;
  __builtin_memcpy(&four, q, sizeof four);
  return _mm512_set1_epi32(four);
}

// What stands for 0 in every output of a block: in each, and in all bytes of it.
inline __m512i zero_of_each(const uint8_t* zeros) {
  return _mm512_maskz_cvtepu8_epi32(kAll, _mm_loadu_si128(reinterpret_cast<const __m128i*>(zeros)));
}
inline __m512i in_all_bytes(__m512i each) { return _mm512_mullo_epi32(each, _mm512_set1_epi32(0x01010101)); }

// Independent sums hide the latency of VPDPBUSD where few tokens leave time for it: of a block, or of so many
// neighbouring ones.
constexpr size_t sums_of(size_t rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

template <size_t kRows, size_t kSums = 1>
struct Accumulators {
  __m512i exact[kSums][kRows];
  __m512 sums[kRows];

  void start() {
#pragma GCC unroll 8
    for (size_t r = 0; r < kRows; ++r) sums[r] = _mm512_setzero_ps();
    clear();
  }
  void clear() {
#pragma GCC unroll 4
    for (size_t s = 0; s < kSums; ++s) {
#pragma GCC unroll 8
      for (size_t r = 0; r < kRows; ++r) exact[s][r] = _mm512_setzero_si512();
    }
  }
  // surplus(r): what the sums of a token hold too much; scales [kBlock] float16, `factor` times the right
  // ones
  template <class Surplus>
  void finish(const Rows& x, size_t groups, const char* scales, size_t g, float factor, Surplus surplus) {
    const __m512 stored = _mm512_maskz_cvtph_ps(
        kAll, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + g * kBlock * 2)));
    const __m512 scale = _mm512_mul_ps(stored, _mm512_set1_ps(factor));
#pragma GCC unroll 8
    for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (size_t s = 1; s < kSums; ++s) exact[0][r] = _mm512_add_epi32(exact[0][r], exact[s][r]);
      const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[r * groups + g]));
      const __m512i found = _mm512_sub_epi32(exact[0][r], surplus(r));
      sums[r] = _mm512_fmadd_ps(_mm512_maskz_cvtepi32_ps(kAll, found), both, sums[r]);
    }
    clear();
  }
};

// Of the integers of a bitmap.
template <bool kWide>
constexpr uint8_t kMiddle = kWide ? 128 : 8;

// So many ones.
inline uint64_t lowest(size_t count) { return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1; }

// The 64 integers that a mask leaves, before zeros are put between them. With kGuarded no byte behind those
// that are stored is read.
template <bool kWide, bool kGuarded>
inline __m512i packed_integers(const uint8_t* values, size_t bytes) {
  if constexpr (kWide) {
    return kGuarded ? _mm512_maskz_loadu_epi8(lowest(bytes), values) : _mm512_loadu_si512(values);
  } else {
    const __m256i halves = kGuarded ? _mm256_maskz_loadu_epi8(static_cast<__mmask32>(lowest(bytes)), values)
                                    : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
    const __m512i wide = _mm512_cvtepu8_epi16(halves);
    // (wide | wide << 4) & 0x0f0f: a byte for each of both
    return _mm512_ternarylogic_epi64(wide, _mm512_slli_epi16(wide, 4), all_bytes(15), 0xa8);
  }
}

template <size_t kRows, size_t kSums, bool kWide, bool kGuarded>
inline const uint8_t* add_quads(const uint8_t* masks, const uint8_t* values, const Rows& x, size_t k,
                                size_t quads, __m512i middle, Accumulators<kRows, kSums>& sums) {
  const auto add = [&](size_t i, size_t s) {
    uint64_t mask;
    __builtin_memcpy(&mask, masks + i * sizeof mask, sizeof mask);
    const auto found = static_cast<size_t>(__builtin_popcountll(mask));
    const size_t bytes = kWide ? found : (found + 1) / 2;
    const __m512i w = _mm512_mask_expand_epi8(middle, mask, packed_integers<kWide, kGuarded>(values, bytes));
    values += bytes;
#pragma GCC unroll 8
    for (size_t r = 0; r < kRows; ++r) {
      const int8_t* q = x.q + r * x.stride + k + i * kQuad;
      sums.exact[s][r] = _mm512_dpbusd_epi32(sums.exact[s][r], w, broadcast_quad(q));
    }
  };
  size_t i = 0;
  for (; i + kSums <= quads; i += kSums) {
    __builtin_prefetch(values + kPrefetch);
    __builtin_prefetch(masks + i * 8 + kPrefetch);
#pragma GCC unroll 4
    for (size_t s = 0; s < kSums; ++s) add(i + s, s);
  }
  for (; i < quads; ++i) add(i, 0);
  return values;
}

template <size_t kRows, size_t kSums>
inline void store_block(const Accumulators<kRows, kSums>& sums, size_t count, float* y, size_t stride) {
  const auto there = static_cast<__mmask16>((1u << count) - 1);
#pragma GCC unroll 8
  for (size_t r = 0; r < kRows; ++r) _mm512_mask_storeu_ps(y + r * stride, there, sums.sums[r]);
}

template <size_t kRows, bool kWide>
void run_bitmap(const Weight& w, const Rows& x, size_t begin, size_t end, float* y, size_t stride) {
  constexpr size_t kSums = sums_of(kRows);
  const size_t groups = groups_of(w), quads = (w.K + kQuad - 1) / kQuad, in_group = w.group / kQuad;
  __m512i middle = all_bytes(kMiddle<kWide>), each = _mm512_set1_epi32(kMiddle<kWide>);
  const size_t most = in_group * kBlock * kQuad / (kWide ? 1 : 2);  // bytes of a group, all of them read
  for (size_t block = begin; block < end; ++block) {
    Accumulators<kRows, kSums> sums;
    sums.start();
    const uint8_t* values = w.values + w.block_values[block];
    const uint8_t* masks = w.masks + block * quads * 8;
    const char* scales = static_cast<const char*>(w.scales) + block * groups * kBlock * 2;
    for (size_t g = 0, first = 0; g < groups; ++g, first += in_group) {
      const size_t count = in_group < quads - first ? in_group : quads - first;
      const uint8_t* own = masks + first * 8;
      if (const uint8_t* zeros = kWide ? nullptr : zeros_of(w, block, g)) {
        each = zero_of_each(zeros);
        middle = in_all_bytes(each);
      }
      const bool inside = static_cast<size_t>(w.values_end - values) >= most;
      values = inside ? add_quads<kRows, kSums, kWide, false>(own, values, x, first * kQuad, count, middle, sums)
                      : add_quads<kRows, kSums, kWide, true>(own, values, x, first * kQuad, count, middle, sums);
      sums.finish(x, groups, scales, g, 1, [&](size_t r) {
        return _mm512_mullo_epi32(each, _mm512_set1_epi32(x.sums[r * groups + g]));
      });
    }
    store_block<kRows>(sums, outputs_of(w, block), y + (block - begin) * kBlock, stride);
  }
}

// The values of neighbouring blocks, which are read side by side.
template <size_t kBlocks>
struct Streams {
  const uint8_t* at[kBlocks];
  const uint8_t* end[kBlocks];
  ptrdiff_t jump[kBlocks];  // from there to where the same stream goes on, in the blocks behind these

  Streams(const Weight& w, size_t block) {
    const size_t blocks = (w.N + kBlock - 1) / kBlock;
    const auto begin = [&](size_t b) { return b < blocks ? w.values + w.block_values[b] : w.values_end; };
    for (size_t b = 0; b < kBlocks; ++b) {
      at[b] = begin(block + b);
      end[b] = begin(block + b + 1);
      jump[b] = begin(block + kBlocks + b) - end[b];
    }
  }
  void prefetch(size_t b) const {
    const uint8_t* ahead = at[b] + kPrefetch;
    __builtin_prefetch(ahead < end[b] ? ahead : ahead + jump[b]);
  }
};

// Memory delivers the streams of several blocks faster than that of one.
template <size_t kRows, size_t kBlocks, bool kZeros>
inline void add_blocks(const Weight& w, const Rows& x, size_t block, float* y, size_t stride) {
  const size_t groups = groups_of(w), n = w.kept;
  alignas(64)
      uint32_t places[16];  // of the four integers of every output: 16 times which sixteen they are of
  for (size_t d = 0; d < n; ++d) {
    places[d] = 0;
    for (size_t i = 0; i < kQuad; ++i) places[d] |= static_cast<uint32_t>((d * kQuad + i) / n * 16) << 8 * i;
  }
  Accumulators<kRows> sums[kBlocks];
  for (auto& own : sums) own.start();
  Streams<kBlocks> values(w, block);
  const char* scales = static_cast<const char*>(w.scales) + block * groups * kBlock * 2;
  for (size_t g = 0, k = 0; g < groups; ++g) {
    const size_t stop = k + w.group < w.K ? k + w.group : w.K;
    __m512i of_weights[kBlocks], zero[kBlocks];
#pragma GCC unroll 8
    for (size_t b = 0; b < kBlocks; ++b) {
      of_weights[b] = _mm512_setzero_si512();
      if constexpr (kZeros) zero[b] = in_all_bytes(zero_of_each(zeros_of(w, block + b, g)));
    }
    for (; k < stop; k += kSpan) {
      __m512i inputs[kRows];
#pragma GCC unroll 8
      for (size_t r = 0; r < kRows; ++r) {
        inputs[r] = _mm512_xor_si512(_mm512_loadu_si512(x.q + r * x.stride + k), all_bytes(128));
      }
      for (size_t d = 0; d < n; ++d) {
        const __m512i sixteen = _mm512_set1_epi32(static_cast<int32_t>(places[d]));
#pragma GCC unroll 8
        for (size_t b = 0; b < kBlocks; ++b) {
          values.prefetch(b);
          const __m512i both = _mm512_loadu_si512(values.at[b]);
          values.at[b] += kBlock * kQuad;
          __m512i integers;
          if constexpr (kZeros) {
            integers =
                _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(both, 4), all_bytes(15)), zero[b]);
          } else {
            integers = _mm512_and_si512(both, all_bytes(0xf0));  // 16 times
          }
          // (both & 15) | sixteen
          const __m512i place = _mm512_ternarylogic_epi64(both, all_bytes(15), sixteen, 0xea);
          of_weights[b] = _mm512_dpbusd_epi32(of_weights[b], all_bytes(128), integers);
#pragma GCC unroll 8
          for (size_t r = 0; r < kRows; ++r) {
            const __m512i own = _mm512_maskz_permutexvar_epi8(kAllBytes, place, inputs[r]);
            sums[b].exact[0][r] = _mm512_dpbusd_epi32(sums[b].exact[0][r], own, integers);
          }
        }
      }
    }
#pragma GCC unroll 8
    for (size_t b = 0; b < kBlocks; ++b) {
      sums[b].finish(x, groups, scales + b * groups * kBlock * 2, g, kZeros ? 1.0f : 1 / 16.0f,
                     [&](size_t) { return of_weights[b]; });
    }
  }
  for (size_t b = 0; b < kBlocks; ++b) store_block(sums[b], outputs_of(w, block + b), y + b * kBlock, stride);
}

template <size_t kRows, bool kZeros>
void run_positions(const Weight& w, const Rows& x, size_t begin, size_t end, float* y, size_t stride) {
  constexpr size_t kTogether = sums_of(kRows);
  size_t block = begin;
  for (; block + kTogether <= end; block += kTogether, y += kTogether * kBlock) {
    add_blocks<kRows, kTogether, kZeros>(w, x, block, y, stride);
  }
  for (; block < end; ++block, y += kBlock) add_blocks<kRows, 1, kZeros>(w, x, block, y, stride);
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

constexpr Kernel avx512vbmi2vnni = {agreed(row::avx512vbmi2vnni, 16, kMaxRows), round_row<16>, run_any<Run>, finish<16>};

}  // namespace sparse_ops::nbits
