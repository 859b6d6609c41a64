// Rounding what is a panel of floats already, one row for each number of a token. Included by generic.h.
#pragma once

#include "kernels/quads/accumulate.h"
#include "kernels/quads/dot.h"
#include "kernels/quads/kernel.h"
#include "kernels/quads/round.h"
#include "kernels/vector.h"

namespace sparse_ops::quads {
namespace {

template <size_t kLanes, size_t kVectors>
void find_extremes(const float* rows, size_t count, float* extremes) {
  constexpr size_t kTile = kLanes * kVectors, kPart = vectors_at_a_time<kVectors>();
  for (size_t from = 0; from < kTile; from += kPart * kLanes) {
    Vector<kLanes> lows[kPart] = {}, highs[kPart] = {}, sums[kPart] = {};
    for (size_t row = 0; row < count; ++row) {
#pragma GCC unroll 4
      for (size_t i = 0; i < kPart; ++i) {
        const Vector<kLanes> v = load<kLanes>(rows + row * kTile + from + i * kLanes);
        lows[i] = minimum<kLanes>(v, lows[i]);
        highs[i] = maximum<kLanes>(v, highs[i]);
        sums[i] += v * 0.0f;
      }
    }
#pragma GCC unroll 4
    for (size_t i = 0; i < kPart; ++i) {
      float* to = extremes + from + i * kLanes;
      store<kLanes>(to, lows[i]);
      store<kLanes>(to + kTile, highs[i]);
      store<kLanes>(to + 2 * kTile, sums[i]);
    }
  }
}

// Words whose sums may overflow.
template <size_t kLanes>
struct WordsOf {
  typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
};

// How the numbers of every token of a tile become bytes.
template <size_t kTile>
struct TileSteps {
  alignas(64) float inverse[kTile], least[kTile], most[kTile];  // of rounded numbers, less the zero point
  alignas(64) int32_t zeros[kTile];                             // in every byte of a word
};

template <size_t kLanes, size_t kVectors>
void round_rows(const Weight& w, const float* rows, const float* extremes, size_t blocks, size_t begin,
                size_t end, int32_t* panel) {
  using Words = typename WordsOf<kLanes>::Words;
  constexpr size_t kTile = kLanes * kVectors;
  TileSteps<kTile> tile;
  for (size_t t = 0; t < kTile; ++t) {
    float low = 0, high = 0, nothing = 0;
    for (size_t block = 0; block < blocks; ++block) {
      const float* own = extremes + block * kExtremes * kTile + t;
      low = own[0] < low ? own[0] : low;
      high = own[kTile] > high ? own[kTile] : high;
      nothing += own[2 * kTile];
    }
    const Steps steps = steps_between(low, high, nothing);
    tile.inverse[t] = steps.inverse;
    tile.least[t] = static_cast<float>(-steps.zero);
    tile.most[t] = static_cast<float>(255 - steps.zero);
    tile.zeros[t] = static_cast<int32_t>(static_cast<uint32_t>(steps.zero) * 0x01010101u);
    if (begin == 0) {
      const int32_t zero = zero_word(steps.zero);
      __builtin_memcpy(panel + w.quads * kTile + t, &zero, sizeof(zero));
      __builtin_memcpy(panel + (w.quads + 1) * kTile + t, &steps.size, sizeof(float));
    }
  }
  for (size_t quad = begin; quad < end; ++quad) {
    const float* from = rows + 4 * quad * kTile;
    const size_t there = 4 * quad >= w.K ? 0 : w.K - 4 * quad < 4 ? w.K - 4 * quad : 4;
    for (size_t at = 0; at < kTile; at += kLanes) {
      const Vector<kLanes> inverse = load<kLanes>(tile.inverse + at);
      const Vector<kLanes> least = load<kLanes>(tile.least + at), most = load<kLanes>(tile.most + at);
      // Sums of bytes that are negative by themselves come right with all four zero points.
      Words word = (Words)load_words<kLanes>(tile.zeros + at);
      const auto add = [&](size_t i) {
        const Vector<kLanes> ratio = load<kLanes>(from + i * kTile + at) * inverse;
        const Vector<kLanes> inside = minimum<kLanes>(maximum<kLanes>(ratio, least), most);
        word += (Words)round_words<kLanes>(inside) << static_cast<uint32_t>(8 * i);
      };
      if (there == 4) {
#pragma GCC unroll 4
        for (size_t i = 0; i < 4; ++i) add(i);
      } else {
        for (size_t i = 0; i < there; ++i) add(i);
      }
      word ^= static_cast<uint32_t>(kMiddleBytes);
      __builtin_memcpy(panel + quad * kTile + at, &word, sizeof(word));
    }
  }
}

}  // namespace
}  // namespace sparse_ops::quads
