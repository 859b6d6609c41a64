// Making panels: rounding tokens to 8 bits, and packing what is bytes already. Included by generic.h.
#pragma once

#include "kernels/quads/kernel.h"
#include "kernels/quads/dot.h"
#include "kernels/vector.h"

namespace sparse_ops::quads {
namespace {

// How the numbers of one token become bytes: q = min(round(x / step) + zero, 255).
struct Steps {
  float size, inverse;
  int32_t zero;
};

constexpr float kSmallestStep = 1e-30f;  // of a token that is 0

// The lowest of all lanes, by halves.
template <size_t kLanes>
inline float lowest(Vector<kLanes> v) {
  if constexpr (kLanes == 1) {
    return v[0];
  } else {
    Vector<kLanes / 2> half[2];
    __builtin_memcpy(half, &v, sizeof(half));
    return lowest<kLanes / 2>(minimum<kLanes / 2>(half[0], half[1]));
  }
}

// Of numbers between 0 or less and 0 or more, with the sum of what 0 times each of them is: of a token with
// NaN or Inf the size is NaN, and so is all that it is multiplied by.
inline Steps steps_between(float low, float high, float nothing) {
  float size = (high - low) / 255.0f;
  size = size > kSmallestStep ? size : kSmallestStep;
  if (!(size + nothing < __builtin_inff())) return {size + nothing, 0, 0};
  const float inverse = 1.0f / size;
  return {size, inverse, round_one(-low * inverse)};
}

template <size_t kLanes>
inline Steps steps_of(const float* x, size_t K) {
  constexpr size_t kSets = 4;  // chains hide the latency
  float low = 0, high = 0, nothing = 0;
  if (K >= kLanes) {
    Vector<kLanes> lows[kSets] = {}, highs[kSets] = {}, sums[kSets] = {};
    const auto see = [&](size_t set, size_t k) {
      const Vector<kLanes> v = load<kLanes>(x + k);
      lows[set] = minimum<kLanes>(v, lows[set]);
      highs[set] = maximum<kLanes>(v, highs[set]);
      sums[set] += v * 0.0f;
    };
    size_t k = 0;
    for (; k + kSets * kLanes <= K; k += kSets * kLanes) {
#pragma GCC unroll 4
      for (size_t set = 0; set < kSets; ++set) see(set, k + set * kLanes);
    }
    for (; k + kLanes <= K; k += kLanes) see(0, k);
    see(1, K - kLanes);  // what is left, and some once more
#pragma GCC unroll 4
    for (size_t set = 1; set < kSets; ++set) {
      lows[0] = minimum<kLanes>(lows[set], lows[0]);
      highs[0] = maximum<kLanes>(highs[set], highs[0]);
      sums[0] += sums[set];
    }
    low = lowest<kLanes>(lows[0]);
    high = -lowest<kLanes>(-highs[0]);
    nothing = add_lanes<kLanes>(sums[0]);
  } else {
    for (size_t k = 0; k < K; ++k) {
      low = x[k] < low ? x[k] : low;
      high = x[k] > high ? x[k] : high;
      nothing += x[k] * 0.0f;
    }
  }
  return steps_between(low, high, nothing);
}

// `count` numbers of a token as bytes, and up to kAtOnce - 1 behind them.
inline void round_some(const float* x, size_t count, const Steps& steps, unsigned char* bytes) {
  size_t k = 0;
  for (; k + kAtOnce <= count; k += kAtOnce) round_bytes(x + k, steps.inverse, steps.zero, bytes + k);
  if (k < count) {
    float rest[kAtOnce] = {};
    __builtin_memcpy(rest, x + k, (count - k) * sizeof(float));
    round_bytes(rest, steps.inverse, steps.zero, bytes + k);
  }
}

// Inputs that are rounded before they are packed.
constexpr size_t kPiece = 256;

// Columns first..first + kColumns - 1 of a panel: of the first `present` ones with these steps, `write(t,
// begin, count, to)` makes bytes of `count` numbers that begin at `begin`, with room for kPiece.
template <size_t kColumns, class Write>
inline void fill_columns(const Weight& w, const Steps* steps, size_t present, size_t first, size_t tile,
                         int32_t* panel, const Write& write) {
  const size_t K = w.K, quads = w.quads;
  for (size_t t = 0; t < kColumns; ++t) {
    const int32_t zero = zero_word(steps[t].zero);
    __builtin_memcpy(panel + quads * tile + first + t, &zero, sizeof(zero));
    __builtin_memcpy(panel + (quads + 1) * tile + first + t, &steps[t].size, sizeof(float));
    // What a number that is 0 becomes.
    const uint32_t nothing = static_cast<uint32_t>(steps[t].zero ^ kMiddle) * 0x01010101u;
    for (size_t quad = (K + 3) / 4; quad < quads; ++quad) {
      panel[quad * tile + first + t] = static_cast<int32_t>(nothing);
    }
  }
  // Words, though moved as floats.
  alignas(64) float words[kColumns][kPiece / 4] = {};
  for (size_t begin = 0; begin < K; begin += kPiece) {
    const size_t count = K - begin < kPiece ? K - begin : kPiece;
    for (size_t t = 0; t < present; ++t) {
      write(t, begin, count, reinterpret_cast<unsigned char*>(words[t]));
    }
    const size_t rows = (count + 3) / 4;
    float* to = reinterpret_cast<float*>(panel) + begin / 4 * tile + first;
    for (size_t row = 0; row < rows; row += 4) {
      Vector<kColumns> columns[4];
      load_columns<kColumns>(words[0] + row, kPiece / 4, columns);
#pragma GCC unroll 4
      for (size_t i = 0; i < 4; ++i) {
        if (row + i < rows) store<kColumns>(to + (row + i) * tile, columns[i]);
      }
    }
  }
}

// Of kColumns tokens from `first` on, those that there are.
template <size_t kColumns>
inline size_t present_of(size_t tokens, size_t first) {
  const size_t left = first < tokens ? tokens - first : 0;
  return left < kColumns ? left : kColumns;
}

// Few columns at a time, so that their tokens are still in the first-level cache when they are read once
// more.
template <size_t kLanes, size_t kVectors>
void round(const Weight& w, const float* x, size_t tokens, size_t first, int32_t* panel) {
  constexpr size_t kTile = kLanes * kVectors, kColumns = kLanes < 8 ? kLanes : 8;
  for (size_t from = first; from < first + kGroup && from < kTile; from += kColumns) {
    const size_t present = present_of<kColumns>(tokens, from);
    Steps steps[kColumns] = {};
    for (size_t t = 0; t < present; ++t)
      steps[t] = steps_of<(kLanes > 8 ? 8 : kLanes)>(x + (from + t) * w.K, w.K);
    fill_columns<kColumns>(w, steps, present, from, kTile, panel,
                           [&](size_t t, size_t begin, size_t count, unsigned char* to) {
                             round_some(x + (from + t) * w.K + begin, count, steps[t], to);
                           });
  }
}

template <size_t kLanes, size_t kVectors>
void pack(const Weight& w, const Bytes& x, size_t tokens, size_t first, int32_t* panel) {
  constexpr size_t kTile = kLanes * kVectors, kColumns = kLanes < 8 ? kLanes : 8;
  const auto flip = static_cast<unsigned char>((x.is_signed ? 128 : 0) ^ kMiddle);
  // What counts as 0: weights behind K may be anything.
  const auto nothing = static_cast<unsigned char>(x.zero ^ kMiddle);
  Steps steps[kColumns];
  for (Steps& own : steps) own = {x.size, 0, x.zero};
  for (size_t from = first; from < first + kGroup && from < kTile; from += kColumns) {
    fill_columns<kColumns>(w, steps, present_of<kColumns>(tokens, from), from, kTile, panel,
                           [&](size_t t, size_t begin, size_t count, unsigned char* to) {
                             const unsigned char* byte = x.data + (from + t) * w.K + begin;
                             for (size_t k = 0; k < count; ++k) to[k] = byte[k] ^ flip;
                             for (size_t k = count; k % 4 != 0; ++k) to[k] = nothing;
                           });
  }
}

template <size_t kLanes>
inline void interleave_at(const unsigned char* const* rows, size_t at, int32_t flip, int32_t* words) {
  IntVector<kLanes> word = load_bytes<kLanes>(rows[0] + at);
#pragma GCC unroll 4
  for (int i = 1; i < 4; ++i) word |= load_bytes<kLanes>(rows[i] + at) << 8 * i;
  word ^= flip;
  __builtin_memcpy(words + at, &word, sizeof(word));
}

// Nothing is touched behind the rows: the last vector overlaps the one before.
template <size_t kLanes>
void interleave(const unsigned char* const* rows, size_t count, int32_t flip, int32_t* words) {
  if (count < kLanes) {
    if constexpr (kLanes > 1) interleave<kLanes / 2>(rows, count, flip, words);
    return;
  }
  const int32_t all = flip ^ kMiddleBytes;
  size_t at = 0;
  for (; at + kLanes <= count; at += kLanes) interleave_at<kLanes>(rows, at, all, words);
  if (at < count) interleave_at<kLanes>(rows, count - kLanes, all, words);
}

}  // namespace
}  // namespace sparse_ops::quads
