// Four products of bytes with a sign are added by one instruction (SDOT), so that integers are multiplied as they
// are. Inputs are picked from 64 by another (TBL); zeros are put back between the integers of a bitmap by the
// same, eight at a time.

#include <arm_neon.h>

#include "kernels/nbits/expand.h"
#include "kernels/nbits/generic.h"
#include "kernels/nbits/table.h"

namespace sparse_ops::nbits {
namespace {

constexpr size_t kQuarters = 4;  // vectors of a quad: four outputs each

inline int8x16_t broadcast_quad(const int8_t* q) {
  int32_t four;
  __builtin_memcpy(&four, q, sizeof four);
  return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

// A byte for every output of a block, as four neighbouring ones for each.
inline void four_of_each(const uint8_t* bytes, uint8x16_t* to) {
  const uint8x16_t all = vld1q_u8(bytes), pairs[2] = {vzip1q_u8(all, all), vzip2q_u8(all, all)};
  for (size_t i = 0; i < 2; ++i) {
    to[2 * i] = vzip1q_u8(pairs[i], pairs[i]);
    to[2 * i + 1] = vzip2q_u8(pairs[i], pairs[i]);
  }
}

template <size_t kRows>
struct Accumulators {
  int32x4_t exact[kRows][kQuarters];
  float32x4_t sums[kRows][kQuarters];

  void start() {
    for (size_t r = 0; r < kRows; ++r) {
      for (size_t h = 0; h < kQuarters; ++h) sums[r][h] = vdupq_n_f32(0);
    }
    clear();
  }
  void clear() {
    for (size_t r = 0; r < kRows; ++r) {
      for (size_t h = 0; h < kQuarters; ++h) exact[r][h] = vdupq_n_s32(0);
    }
  }
  void add(size_t r, size_t h, int8x16_t integers, int8x16_t inputs) {
    exact[r][h] = vdotq_s32(exact[r][h], integers, inputs);
  }
  void finish(const Weight& w, const Rows& x, size_t block, size_t g) {
    const size_t groups = groups_of(w);
    float scale[kBlock];
    for (size_t j = 0; j < kBlock; ++j) scale[j] = scale_at(w, block, g, j);
    for (size_t r = 0; r < kRows; ++r) {
      for (size_t h = 0; h < kQuarters; ++h) {
        const float32x4_t both = vmulq_n_f32(vld1q_f32(scale + 4 * h), x.scales[r * groups + g]);
        sums[r][h] = vfmaq_f32(sums[r][h], vcvtq_f32_s32(exact[r][h]), both);
      }
    }
    clear();
  }
  void store(size_t count, float* y, size_t stride) const {
    Sums<kRows> all;
    for (size_t r = 0; r < kRows; ++r) {
      for (size_t h = 0; h < kQuarters; ++h) vst1q_f32(all[r] + 4 * h, sums[r][h]);
    }
    store_sums<kRows>(all, count, y, stride);
  }
};

// Half bytes become bytes, with the highest bit set.
inline void spread_halves(const uint8_t* values, uint8_t* to) {
  const uint8x16_t kept = vdupq_n_u8(0x80);
  for (size_t i = 0; i < 2; ++i) {
    const uint8x16_t both = vld1q_u8(values + 16 * i);
    const uint8x16_t low = vorrq_u8(vandq_u8(both, vdupq_n_u8(15)), kept);
    const uint8x16_t high = vorrq_u8(vshrq_n_u8(both, 4), kept);
    vst1q_u8(to + 32 * i, vzip1q_u8(low, high));
    vst1q_u8(to + 32 * i + 16, vzip2q_u8(low, high));
  }
}

// Four outputs of a quad: the next integers, with zeros between them where the mask says so.
inline uint8x16_t expanded(const uint8_t* mask, const uint8_t*& next) {
  uint8x8_t parts[2];
  for (size_t i = 0; i < 2; ++i) {
    const uint8x8_t stored = vld1_u8(next);
    parts[i] = vtbl1_u8(stored, vld1_u8(kExpansions.of[mask[i]]));
    next += __builtin_popcount(mask[i]);
  }
  return vcombine_u8(parts[0], parts[1]);
}

template <size_t kRows, bool kWide>
void run_bitmap(const Weight& w, const Rows& x, size_t begin, size_t end, float* y, size_t stride) {
  const size_t groups = groups_of(w), quads = (w.K + kQuad - 1) / kQuad, in_group = w.group / kQuad;
  // Of four bits, what stands for 0: in all bytes of every output.
  uint8x16_t zero[kQuarters] = {vdupq_n_u8(8), vdupq_n_u8(8), vdupq_n_u8(8), vdupq_n_u8(8)};
  Spread spread;
  for (size_t block = begin; block < end; ++block) {
    Accumulators<kRows> sums;
    sums.start();
    const uint8_t* values = w.values + w.block_values[block];
    const uint8_t* masks = w.masks + block * quads * 8;
    for (size_t g = 0, first = 0; g < groups; ++g, first += in_group) {
      const size_t stop = in_group < quads - first ? first + in_group : quads;
      if (const uint8_t* zeros = kWide ? nullptr : zeros_of(w, block, g)) four_of_each(zeros, zero);
      for (size_t part = first; part < stop; part += kQuadsAtOnce) {
        const size_t count = kQuadsAtOnce < stop - part ? kQuadsAtOnce : stop - part;
        values = spread.fill<kWide>(w, masks + part * 8, values, count, [](const uint8_t* from, uint8_t* to) {
          if constexpr (kWide) {
            for (size_t h = 0; h < kQuarters; ++h) {
              vst1q_u8(to + 16 * h, veorq_u8(vld1q_u8(from + 16 * h), vdupq_n_u8(128)));
            }
          } else {
            spread_halves(from, to);
          }
        });
        for (size_t i = 0; i < count; ++i) {
          const uint8_t* next = spread.starts[i];
          const uint8_t* mask = masks + (part + i) * 8;
          const int8_t* q = x.q + (part + i) * kQuad;
          for (size_t h = 0; h < kQuarters; ++h) {
            const uint8x16_t found = expanded(mask + 2 * h, next);
            int8x16_t integers = vreinterpretq_s8_u8(found);
            if constexpr (!kWide) {
              const uint8x16_t kept = vcltzq_s8(integers);
              integers = vreinterpretq_s8_u8(
                  vsubq_u8(vandq_u8(found, vdupq_n_u8(0x7f)), vandq_u8(zero[h], kept)));
            }
            for (size_t r = 0; r < kRows; ++r) sums.add(r, h, integers, broadcast_quad(q + r * x.stride));
          }
        }
      }
      sums.finish(w, x, block, g);
    }
    sums.store(outputs_of(w, block), y + (block - begin) * kBlock, stride);
  }
}

template <size_t kRows>
void run_n_of_16(const Weight& w, const Rows& x, size_t begin, size_t end, float* y, size_t stride) {
  const size_t groups = groups_of(w), n = w.kept;
  uint32_t places[16];  // of the four integers of every output: 16 times which sixteen they are of
  for (size_t d = 0; d < n; ++d) {
    places[d] = 0;
    for (size_t i = 0; i < kQuad; ++i) places[d] |= static_cast<uint32_t>((d * kQuad + i) / n * 16) << 8 * i;
  }
  for (size_t block = begin; block < end; ++block) {
    Accumulators<kRows> sums;
    sums.start();
    const uint8_t* values = w.values + w.block_values[block];
    for (size_t g = 0, k = 0; g < groups; ++g) {
      const size_t stop = k + w.group < w.K ? k + w.group : w.K;
      const uint8_t* zeros = zeros_of(w, block, g);
      uint8x16_t zero[kQuarters] = {};
      if (zeros != nullptr) four_of_each(zeros, zero);
      for (; k < stop; k += kSpan) {
        int8x16x4_t inputs[kRows];
        for (size_t r = 0; r < kRows; ++r) {
          for (size_t s = 0; s < kSpan / 16; ++s) inputs[r].val[s] = vld1q_s8(x.q + r * x.stride + k + 16 * s);
        }
        for (size_t d = 0; d < n; ++d, values += kBlock * kQuad) {
          __builtin_prefetch(values + kAhead);
          const uint8x16_t sixteen = vreinterpretq_u8_u32(vdupq_n_u32(places[d]));
          for (size_t h = 0; h < kQuarters; ++h) {
            const uint8x16_t both = vld1q_u8(values + 16 * h);
            const uint8x16_t place = vorrq_u8(vandq_u8(both, vdupq_n_u8(15)), sixteen);
            const int8x16_t integers =
                zeros == nullptr ? vshrq_n_s8(vreinterpretq_s8_u8(both), 4)
                                 : vreinterpretq_s8_u8(vsubq_u8(vshrq_n_u8(both, 4), zero[h]));
            for (size_t r = 0; r < kRows; ++r) sums.add(r, h, integers, vqtbl4q_s8(inputs[r], place));
          }
        }
      }
      sums.finish(w, x, block, g);
    }
    sums.store(outputs_of(w, block), y + (block - begin) * kBlock, stride);
  }
}

template <size_t kRows, Layout kLayout>
struct Run {
  static constexpr auto run =
      kLayout == Layout::n_of_16 ? run_n_of_16<kRows> : run_bitmap<kRows, kLayout == Layout::bitmap8>;
};

}  // namespace

constexpr Kernel neon_dotprod = {agreed(row::neon_dotprod, 4, kMaxRows), round_row<4>, run_any<Run>, finish<4>};

}  // namespace sparse_ops::nbits
