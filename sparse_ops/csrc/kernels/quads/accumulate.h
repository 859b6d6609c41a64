// How a kernel walks over the stored quads of one block of outputs. Included by generic.h.
#pragma once

#include "kernels/quads/dot.h"
#include "kernels/quads/kernel.h"
#include "kernels/vector.h"

namespace sparse_ops::quads {
namespace {

// Entries are fetched this many bytes ahead: the hardware stops at the end of every page.
constexpr size_t kAhead = 1024;

inline int32_t load_word(const void* from) {
  int32_t word;
  __builtin_memcpy(&word, from, sizeof(word));
  return word;
}

template <size_t kLanes>
inline IntVector<kLanes> load_words(const void* from) {
  IntVector<kLanes> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

// What turns sums into floats: of every output of a block; zeros for outputs behind N.
struct Channels {
  float scales[256], bias[256];
  int32_t sums[256];

  Channels(const Weight& w, size_t block) {
    for (size_t n = 0; n < w.block; ++n) {
      const size_t channel = block * w.block + n;
      const bool there = channel < w.N;
      scales[n] = there ? load_float(w.scales + 4 * channel) : 0.0f;
      bias[n] = there && w.grid.size == 0 ? load_float(w.bias + 4 * channel) : 0.0f;
      sums[n] = there ? sum_word(w.sums[channel]) : 0;
    }
  }
};

// One chunk of inputs and the block of outputs that is computed.
struct Chunk {
  const int32_t* panel;  // its rows
  bool first, last;
  const int32_t* zeros;  // of every token of the tile
  const float* steps;
  const Channels& channels;
};

// Sums of one output and kVectors vectors of the tile that begin at token `from`: as they were after the chunk
// before, and what they are after this one. acc [tile] of the output are sums or, after the last, floats.
template <size_t kLanes, size_t kVectors>
inline void begin_sums(const Chunk& chunk, size_t from, const float* acc, IntVector<kLanes>* sums) {
  if (chunk.first) {
#pragma GCC unroll 16
    for (size_t v = 0; v < kVectors; ++v) sums[v] = IntVector<kLanes>{};
  } else {
#pragma GCC unroll 16
    for (size_t v = 0; v < kVectors; ++v) sums[v] = load_words<kLanes>(acc + from + v * kLanes);
  }
}

template <size_t kLanes, size_t kVectors>
inline void end_sums(const Chunk& chunk, size_t row, size_t from, const IntVector<kLanes>* sums, float* acc) {
  if (!chunk.last) {
#pragma GCC unroll 16
    for (size_t v = 0; v < kVectors; ++v) __builtin_memcpy(acc + from + v * kLanes, &sums[v], sizeof(sums[v]));
    return;
  }
  const IntVector<kLanes> total = splat_word<kLanes>(chunk.channels.sums[row]);
  const Vector<kLanes> scale = splat<kLanes>(chunk.channels.scales[row]);
  const Vector<kLanes> bias = splat<kLanes>(chunk.channels.bias[row]);
#pragma GCC unroll 16
  for (size_t v = 0; v < kVectors; ++v) {
    const size_t t = from + v * kLanes;
    const IntVector<kLanes> exact = sums[v] - shift_of<kLanes>(load_words<kLanes>(chunk.zeros + t), total);
    const Vector<kLanes> floats = __builtin_convertvector(exact, Vector<kLanes>);
    store<kLanes>(acc + t, floats * load<kLanes>(chunk.steps + t) * scale + bias);
  }
}

template <size_t kLanes, size_t kVectors, bool kWide>
inline void add_quad(IntVector<kLanes>* sums, const int32_t* row, const int8_t* value) {
  const Quad<kLanes, kWide> quad(load_word(value));
  asm("" : "+r"(row));  // one register and displacements: an index register would cost a micro-operation each
#pragma GCC unroll 16
  for (size_t v = 0; v < kVectors; ++v) sums[v] = quad.add_to(sums[v], load_words<kLanes>(row + v * kLanes));
}

// One segment. kSets independent sums per vector hide the latency of the products.
template <size_t kLanes, size_t kVectors, size_t kSets, bool kWide>
inline void add_segment(const Chunk& chunk, const uint8_t* offsets, const int8_t* values, size_t count,
                        size_t row, float* acc) {
  constexpr size_t kTile = kLanes * kVectors;
  IntVector<kLanes> sums[kSets][kVectors];
  begin_sums<kLanes, kVectors>(chunk, 0, acc, sums[0]);
#pragma GCC unroll 16
  for (size_t s = 1; s < kSets; ++s) {
#pragma GCC unroll 16
    for (size_t v = 0; v < kVectors; ++v) sums[s][v] = IntVector<kLanes>{};
  }
  size_t i = 0;
  for (; i + 4 <= count; i += 4) {
    uint32_t four;  // the offsets of four entries at the price of one load
    __builtin_memcpy(&four, offsets + i, sizeof(four));
    __builtin_prefetch(values + 4 * i + kAhead);
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; ++j) {
      const size_t shift = __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__ ? 8 * j : 24 - 8 * j;
      add_quad<kLanes, kVectors, kWide>(sums[j % kSets], chunk.panel + ((four >> shift) & 255) * kTile,
                                        values + 4 * (i + j));
    }
  }
#pragma GCC unroll 4
  for (size_t j = 0; j < 3; ++j) {
    if (i + j == count) break;
    add_quad<kLanes, kVectors, kWide>(sums[j % kSets], chunk.panel + offsets[i + j] * kTile,
                                      values + 4 * (i + j));
  }
#pragma GCC unroll 16
  for (size_t s = 1; s < kSets; ++s) {
#pragma GCC unroll 16
    for (size_t v = 0; v < kVectors; ++v) sums[0][v] += sums[s][v];
  }
  end_sums<kLanes, kVectors>(chunk, row, 0, sums[0], acc);
}

// Vectors of a tile that are computed at a time where no quad of a chunk is missing and outputs share them.
template <size_t kVectors>
constexpr size_t vectors_at_a_time() {
  constexpr size_t kMost = kRegisters == 32 ? 4 : 2;
  return kVectors < kMost ? kVectors : kMost;
}

// kFullRows segments with all quads of a chunk.
template <size_t kLanes, size_t kVectors, bool kWide>
inline void add_full_segments(const Chunk& chunk, const int8_t* values, size_t count, const uint8_t* rows,
                              float* acc) {
  constexpr size_t kTile = kLanes * kVectors, kPart = vectors_at_a_time<kVectors>();
  for (size_t from = 0; from < kTile; from += kPart * kLanes) {
    IntVector<kLanes> sums[kFullRows][kPart];
#pragma GCC unroll 4
    for (size_t r = 0; r < kFullRows; ++r) {
      begin_sums<kLanes, kPart>(chunk, from, acc + rows[r] * kTile, sums[r]);
    }
    const int32_t* x = chunk.panel + from;
    const int8_t* value = values;
    for (size_t i = 0; i < count; ++i, x += kTile, value += 4) {
      IntVector<kLanes> a[kPart];
#pragma GCC unroll 4
      for (size_t v = 0; v < kPart; ++v) a[v] = load_words<kLanes>(x + v * kLanes);
#pragma GCC unroll 4
      for (size_t r = 0; r < kFullRows; ++r) {
        const Quad<kLanes, kWide> quad(load_word(value + 4 * r * count));
#pragma GCC unroll 4
        for (size_t v = 0; v < kPart; ++v) sums[r][v] = quad.add_to(sums[r][v], a[v]);
      }
    }
#pragma GCC unroll 4
    for (size_t r = 0; r < kFullRows; ++r) {
      end_sums<kLanes, kPart>(chunk, rows[r], from, sums[r], acc + rows[r] * kTile);
    }
  }
}

template <size_t kLanes, size_t kVectors, size_t kSets, bool kWide>
inline void multiply_block(const Weight& w, size_t block, const int32_t* panel, float* acc) {
  constexpr size_t kTile = kLanes * kVectors;
  const Channels channels(w, block);
  size_t entry = w.block_entries[block];
  const uint8_t* counts = w.counts + block * w.chunks * w.block;
  const uint8_t* rows = w.rows + block * w.chunks * w.block;
  const auto* zeros = panel + w.quads * kTile;
  const auto* steps = reinterpret_cast<const float*>(zeros + kTile);
  for (size_t c = 0; c < w.chunks; ++c, counts += w.block, rows += w.block) {
    const Chunk chunk{panel + c * w.chunk * kTile, c == 0, c + 1 == w.chunks, zeros, steps, channels};
    for (size_t s = 0; s < w.block;) {
      const size_t count = counts[s], row = rows[s];
      const int8_t* values = w.values + 4 * entry;
      // Offsets rise strictly, so that a segment of all quads has every one of them.
      if (s + kFullRows <= w.block && count == w.chunk && counts[s + 1] == count && counts[s + 2] == count &&
          counts[s + 3] == count) {
        add_full_segments<kLanes, kVectors, kWide>(chunk, values, count, rows + s, acc);
        entry += kFullRows * count;
        s += kFullRows;
      } else {
        const uint8_t* offsets = w.offsets + entry;
        __builtin_prefetch(offsets + kAhead / 4);
        add_segment<kLanes, kVectors, kSets, kWide>(chunk, offsets, values, count, row, acc + row * kTile);
        entry += count;
        ++s;
      }
    }
  }
}

template <size_t kLanes, size_t kVectors, size_t kSets>
void multiply(const Weight& w, size_t block, const int32_t* panel, float* acc) {
  if (kAnyIsNarrow || !w.wide) return multiply_block<kLanes, kVectors, kSets, false>(w, block, panel, acc);
  return multiply_block<kLanes, kVectors, kSets, true>(w, block, panel, acc);
}

template <size_t kLanes, size_t kVectors>
void settle(const Weight& w, size_t block, size_t channels, float* acc) {
  // Of a number within +-2^22, what is left of the sum are whole ones, to the nearest, ties to even.
  const Vector<kLanes> large = splat<kLanes>(12582912.0f), inverse = splat<kLanes>(1.0f / w.grid.size);
  const Vector<kLanes> low = splat<kLanes>(w.grid.low), high = splat<kLanes>(w.grid.high);
  const Vector<kLanes> size = splat<kLanes>(w.grid.size);
  for (size_t n = 0; n < channels; ++n) {
    const Vector<kLanes> bias = splat<kLanes>(load_float(w.bias + 4 * (block * w.block + n)));
    float* row = acc + n * kLanes * kVectors;
#pragma GCC unroll 16
    for (size_t v = 0; v < kVectors; ++v, row += kLanes) {
      const Vector<kLanes> ratio = load<kLanes>(row) * inverse;
      const Vector<kLanes> inside = maximum<kLanes>(minimum<kLanes>(ratio, high), low);
      store<kLanes>(row, (inside + large - large) * size + bias);
    }
  }
}

}  // namespace
}  // namespace sparse_ops::quads
