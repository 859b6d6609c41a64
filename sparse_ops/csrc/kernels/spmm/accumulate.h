// How a kernel walks over the stored entries of one block of output channels. Included by generic.h.
#pragma once

#include "kernels/spmm/kernel.h"
#include "kernels/vector.h"

namespace sparse_ops::spmm {
namespace {

// Entries are fetched this many bytes ahead: the hardware stops at the end of every page.
constexpr size_t kAhead = 2048;

// sum += w * row[tile]
template <size_t kLanes, size_t kVectors>
inline void add_entry(Vector<kLanes>* sum, const float* row, const unsigned char* value) {
  const Vector<kLanes> w = splat<kLanes>(load_float(value));
  asm("" : "+r"(row));  // one register and displacements: an index register would cost a micro-operation each
#pragma GCC unroll 16
  for (size_t v = 0; v < kVectors; ++v) sum[v] += w * load<kLanes>(row + v * kLanes);
}

// acc[tile] += one segment; with a `bias` it is what acc begins with. kSets independent sums per vector hide
// the latency of the multiply-add.
template <size_t kLanes, size_t kVectors, size_t kSets>
inline void add_segment(const float* x, const uint8_t* offsets, const unsigned char* values, size_t count,
                        const float* bias, float* acc) {
  constexpr size_t kTile = kLanes * kVectors;
  Vector<kLanes> sum[kSets][kVectors];
#pragma GCC unroll 16
  for (size_t v = 0; v < kVectors; ++v) {
    sum[0][v] = bias != nullptr ? splat<kLanes>(*bias) : load<kLanes>(acc + v * kLanes);
#pragma GCC unroll 16
    for (size_t s = 1; s < kSets; ++s) sum[s][v] = Vector<kLanes>{};
  }
  size_t i = 0;
  for (; i + 4 <= count; i += 4) {
    uint32_t four;  // the offsets of four entries at the price of one load
    __builtin_memcpy(&four, offsets + i, sizeof(four));
    __builtin_prefetch(values + 4 * i + kAhead);
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

constexpr size_t kWideRows = kRegisters == 32 ? 8 : 4;  // output channels that share a loaded activation

// How many of the kVectors vectors of a tile fit the registers: sums for some channels, activations, one
// weight.
template <size_t kVectors, size_t kRows>
constexpr size_t vectors_at_a_time() {
  size_t best = 1;
  for (size_t part = 2; part <= kVectors && part * (kRows + 1) + 1 <= kRegisters; ++part) {
    if (kVectors % part == 0) best = part;
  }
  return best;
}

// acc[kWidth][tile] += one segment (with a `bias` [kWidth]: it is what acc begins with) whose entries have
// kWidth values each, for neighbouring output channels. A vector of activations is loaded once for kRows
// channels: that is why blocks lie along the outputs.
template <size_t kLanes, size_t kVectors, size_t kWidth>
inline void add_wide_segment(const float* x, const uint8_t* offsets, const unsigned char* values,
                             size_t count, const float* bias, float* acc) {
  constexpr size_t kTile = kLanes * kVectors;
  constexpr size_t kRows = kWidth < kWideRows ? kWidth : kWideRows;
  constexpr size_t kPart = vectors_at_a_time<kVectors, kRows>();
  for (size_t r0 = 0; r0 < kWidth; r0 += kRows) {
    for (size_t v0 = 0; v0 < kVectors; v0 += kPart) {
      float* to = acc + r0 * kTile + v0 * kLanes;
      Vector<kLanes> sum[kRows][kPart];
#pragma GCC unroll 16
      for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
        for (size_t v = 0; v < kPart; ++v) {
          sum[r][v] =
              bias != nullptr ? splat<kLanes>(bias[r0 + r]) : load<kLanes>(to + r * kTile + v * kLanes);
        }
      }
      const unsigned char* value = values + 4 * r0;
      const float* from = x + v0 * kLanes;
#pragma GCC unroll 2
      for (size_t i = 0; i < count; ++i, value += 4 * kWidth) {
        const float* row = from + offsets[i] * kTile;
        __builtin_prefetch(value + kAhead);
        Vector<kLanes> a[kPart];
#pragma GCC unroll 16
        for (size_t v = 0; v < kPart; ++v) a[v] = load<kLanes>(row + v * kLanes);
#pragma GCC unroll 16
        for (size_t r = 0; r < kRows; ++r) {
          const Vector<kLanes> w = splat<kLanes>(load_float(value + 4 * r));
#pragma GCC unroll 16
          for (size_t v = 0; v < kPart; ++v) sum[r][v] += w * a[v];
        }
      }
#pragma GCC unroll 16
      for (size_t r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
        for (size_t v = 0; v < kPart; ++v) store<kLanes>(to + r * kTile + v * kLanes, sum[r][v]);
      }
    }
  }
}

// Every segment of one block: add(activations of its chunk, offsets, values, count, row).
template <size_t kTile, size_t kWidth, class Add>
inline void for_each_segment(const Weight& w, size_t block, const float* panel, Add add) {
  const unsigned char* values = w.values + 4 * kWidth * w.block_entries[block];
  const uint8_t* offsets = w.offsets + w.block_entries[block];
  const size_t groups = w.block / kWidth;
  const uint8_t* counts = w.counts + block * w.chunks * groups;
  const uint8_t* rows = w.rows + block * w.chunks * groups;
  for (size_t c = 0; c < w.chunks; ++c) {
    const float* x = panel + c * w.chunk * kTile;
    for (size_t s = 0; s < groups; ++s) {
      const size_t count = *counts++;
      __builtin_prefetch(offsets + kAhead / 4);
      add(x, offsets, values, count, size_t{*rows++});
      offsets += count;
      values += 4 * kWidth * count;
    }
  }
}

// The bias of each channel of a block; of channels behind N it is 0.
struct BlockBias {
  float values[256];

  BlockBias(const Weight& w, size_t block) {
    for (size_t n = 0; n < w.block; ++n) {
      const size_t channel = block * w.block + n;
      values[n] = channel < w.N ? load_float(w.bias + 4 * channel) : 0.0f;
    }
  }
};

template <size_t kLanes, size_t kVectors, size_t kSets>
void multiply(const Weight& w, size_t block, const float* panel, float* acc) {
  constexpr size_t kTile = kLanes * kVectors;
  const BlockBias bias(w, block);
  const float* second_chunk = panel + w.chunk * kTile;
  const auto wide = [&]<size_t kWidth>(std::integral_constant<size_t, kWidth>) {
    for_each_segment<kTile, kWidth>(
        w, block, panel,
        [&](const float* x, const uint8_t* offsets, const unsigned char* values, size_t count, size_t row) {
          const float* start = x < second_chunk ? bias.values + row * kWidth : nullptr;
          add_wide_segment<kLanes, kVectors, kWidth>(x, offsets, values, count, start,
                                                     acc + row * kWidth * kTile);
        });
  };
  if (w.width == 4) return wide(std::integral_constant<size_t, 4>());
  if (w.width == 8) return wide(std::integral_constant<size_t, 8>());
  for_each_segment<kTile, 1>(
      w, block, panel,
      [&](const float* x, const uint8_t* offsets, const unsigned char* values, size_t count, size_t row) {
        // Short segments overlap in the processor by themselves: fewer sums are quicker to add up.
        constexpr size_t kShortSets = kSets > 2 ? kSets / 2 : 1;
        constexpr size_t kLong = 24;
        const float* start = x < second_chunk ? bias.values + row : nullptr;
        float* sum = acc + row * kTile;
        if (count >= kLong) {
          add_segment<kLanes, kVectors, kSets>(x, offsets, values, count, start, sum);
        } else {
          add_segment<kLanes, kVectors, kShortSets>(x, offsets, values, count, start, sum);
        }
      });
}

}  // namespace
}  // namespace sparse_ops::spmm
