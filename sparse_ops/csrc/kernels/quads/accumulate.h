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

// What sums of a block begin with and become, where every token of a tile has its own steps: floats. Zeros
// for outputs behind N.
struct TokenEnd {
  const int32_t* zeros;  // of every token of the tile
  const float* steps;
  float scales[256], bias[256];
  int32_t sums[256];

  TokenEnd(const Weight& w, size_t block, const int32_t* zeros_of_tile, const float* steps_of_tile)
      : zeros(zeros_of_tile), steps(steps_of_tile) {
    for (size_t n = 0; n < w.block; ++n) {
      const size_t channel = block * w.block + n;
      const bool there = channel < w.N;
      scales[n] = there ? load_float(w.scales + 4 * channel) : 0.0f;
      bias[n] = there && w.grid.size == 0 ? load_float(w.bias + 4 * channel) : 0.0f;
      sums[n] = there ? sum_word(w.sums[channel]) : 0;
    }
  }

  template <size_t kLanes>
  IntVector<kLanes> begin(size_t /*row*/) const {
    return IntVector<kLanes>{};
  }

  template <size_t kLanes, size_t kVectors>
  void finish(size_t row, size_t from, const IntVector<kLanes>* sum, float* acc) const {
    const IntVector<kLanes> total = splat_word<kLanes>(sums[row]);
    const Vector<kLanes> scale = splat<kLanes>(scales[row]);
    const Vector<kLanes> added = splat<kLanes>(bias[row]);
#pragma GCC unroll 16
    for (size_t v = 0; v < kVectors; ++v) {
      const size_t t = from + v * kLanes;
      const IntVector<kLanes> exact = sum[v] - shift_of<kLanes>(load_words<kLanes>(zeros + t), total);
      const Vector<kLanes> floats = __builtin_convertvector(exact, Vector<kLanes>);
      store<kLanes>(acc + t, floats * load<kLanes>(steps + t) * scale + added);
    }
  }
};

// The same where all positions have the same steps and results are bytes: `tile` of them in the place of an
// output's first sums, which are read by then.
struct ByteEnd {
  float low, high;
  int32_t zero;
  float factors[256];
  int32_t first[256];  // the bias less what the zero point of X adds

  ByteEnd(const Weight& w, size_t block, const ByteSteps& steps)
      : low(steps.low), high(steps.high), zero(steps.y_zero) {
    for (size_t n = 0; n < w.block; ++n) {
      const size_t channel = block * w.block + n;
      const bool there = channel < w.N;
      factors[n] = there ? steps.factors[channel] : 0.0f;
      first[n] = there ? load_word(w.bias + 4 * channel) - (steps.x_zero - kMiddle) * w.sums[channel] : 0;
    }
  }

  template <size_t kLanes>
  IntVector<kLanes> begin(size_t row) const {
    return splat_word<kLanes>(first[row]);
  }

  template <size_t kLanes, size_t kVectors>
  void finish(size_t row, size_t from, const IntVector<kLanes>* sum, float* acc) const {
    const Vector<kLanes> factor = splat<kLanes>(factors[row]);
    const Vector<kLanes> least = splat<kLanes>(low), most = splat<kLanes>(high);
    const IntVector<kLanes> shift = splat_word<kLanes>(zero);
    auto* bytes = reinterpret_cast<unsigned char*>(acc) + from;
    IntVector<kLanes> words[kVectors];
#pragma GCC unroll 16
    for (size_t v = 0; v < kVectors; ++v) {
      const Vector<kLanes> floats = __builtin_convertvector(sum[v], Vector<kLanes>) * factor;
      words[v] = round_words<kLanes>(minimum<kLanes>(maximum<kLanes>(floats, least), most)) + shift;
    }
    size_t v = 0;
#pragma GCC unroll 4
    for (; v + 4 <= kVectors; v += 4) store_low_bytes_of_four<kLanes>(words + v, bytes + v * kLanes);
#pragma GCC unroll 4
    for (; v < kVectors; ++v) store_low_bytes<kLanes>(words[v], bytes + v * kLanes);
  }
};

// One chunk of inputs of the block of outputs that is computed.
template <class End>
struct Chunk {
  const int32_t* panel;  // its rows
  bool first, last;
  const End& end;
};

// Sums of one output and kVectors vectors of the tile that begin at token `from`: as they were after the
// chunk before, and what they are after this one. acc [tile] of the output are sums or, after the last,
// results.
template <size_t kLanes, size_t kVectors, class End>
inline void begin_sums(const Chunk<End>& chunk, size_t row, size_t from, const float* acc,
                       IntVector<kLanes>* sums) {
  if (chunk.first) {
    const IntVector<kLanes> all = chunk.end.template begin<kLanes>(row);
#pragma GCC unroll 16
    for (size_t v = 0; v < kVectors; ++v) sums[v] = all;
  } else {
#pragma GCC unroll 16
    for (size_t v = 0; v < kVectors; ++v) sums[v] = load_words<kLanes>(acc + from + v * kLanes);
  }
}

template <size_t kLanes, size_t kVectors, class End>
inline void end_sums(const Chunk<End>& chunk, size_t row, size_t from, const IntVector<kLanes>* sums,
                     float* acc) {
  if (chunk.last) return chunk.end.template finish<kLanes, kVectors>(row, from, sums, acc);
#pragma GCC unroll 16
  for (size_t v = 0; v < kVectors; ++v) __builtin_memcpy(acc + from + v * kLanes, &sums[v], sizeof(sums[v]));
}

template <size_t kLanes, size_t kVectors, bool kWide>
inline void add_quad(IntVector<kLanes>* sums, const int32_t* row, const int8_t* value) {
  const Quad<kLanes, kWide> quad(load_word(value));
  asm("" : "+r"(row));  // one register and displacements: an index register would cost a micro-operation each
#pragma GCC unroll 16
  for (size_t v = 0; v < kVectors; ++v) sums[v] = quad.add_to(sums[v], load_words<kLanes>(row + v * kLanes));
}

// One segment. kSets independent sums per vector hide the latency of the products.
template <size_t kLanes, size_t kVectors, size_t kSets, bool kWide, class End>
inline void add_segment(const Chunk<End>& chunk, const uint8_t* offsets, const int8_t* values, size_t count,
                        size_t row, float* acc) {
  constexpr size_t kTile = kLanes * kVectors;
  IntVector<kLanes> sums[kSets][kVectors];
  begin_sums<kLanes, kVectors>(chunk, row, 0, acc, sums[0]);
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
  if constexpr (kVectors < kMost) return kVectors;
  return kVectors % kMost == 0 ? kMost : 1;
}

// kFullRows segments with all quads of a chunk.
template <size_t kLanes, size_t kVectors, bool kWide, class End>
inline void add_full_segments(const Chunk<End>& chunk, const int8_t* values, size_t count,
                              const uint8_t* rows, float* acc) {
  constexpr size_t kTile = kLanes * kVectors, kPart = vectors_at_a_time<kVectors>();
  for (size_t from = 0; from < kTile; from += kPart * kLanes) {
    IntVector<kLanes> sums[kFullRows][kPart];
#pragma GCC unroll 4
    for (size_t r = 0; r < kFullRows; ++r) {
      begin_sums<kLanes, kPart>(chunk, rows[r], from, acc + rows[r] * kTile, sums[r]);
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

template <size_t kLanes, size_t kVectors, size_t kSets, bool kWide, class End>
inline void multiply_block(const Weight& w, size_t block, const int32_t* panel, const End& end, float* acc) {
  constexpr size_t kTile = kLanes * kVectors;
  size_t entry = w.block_entries[block];
  const uint8_t* counts = w.counts + block * w.chunks * w.block;
  const uint8_t* rows = w.rows + block * w.chunks * w.block;
  for (size_t c = 0; c < w.chunks; ++c, counts += w.block, rows += w.block) {
    const Chunk<End> chunk{panel + c * w.chunk * kTile, c == 0, c + 1 == w.chunks, end};
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

template <size_t kLanes, size_t kVectors, size_t kSets, class End>
inline void multiply_any(const Weight& w, size_t block, const int32_t* panel, const End& end, float* acc) {
  if (kAnyIsNarrow || !w.wide) {
    return multiply_block<kLanes, kVectors, kSets, false>(w, block, panel, end, acc);
  }
  return multiply_block<kLanes, kVectors, kSets, true>(w, block, panel, end, acc);
}

template <size_t kLanes, size_t kVectors, size_t kSets>
void multiply(const Weight& w, size_t block, const int32_t* panel, float* acc) {
  const int32_t* zeros = panel + w.quads * kLanes * kVectors;
  const auto* steps = reinterpret_cast<const float*>(zeros + kLanes * kVectors);
  multiply_any<kLanes, kVectors, kSets>(w, block, panel, TokenEnd(w, block, zeros, steps), acc);
}

template <size_t kLanes, size_t kVectors, size_t kSets>
void multiply_bytes(const Weight& w, size_t block, const ByteSteps& steps, const int32_t* panel, float* acc) {
  multiply_any<kLanes, kVectors, kSets>(w, block, panel, ByteEnd(w, block, steps), acc);
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
