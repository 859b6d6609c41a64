// Putting zeros back between the integers of a bitmap by shuffles of bytes, eight at a time: for instruction sets
// without an instruction for that. Included by one source file per instruction set.
#pragma once

#include "kernels/nbits/kernel.h"

namespace sparse_ops::nbits {
namespace {

// For each mask of eight bits, where among the integers that it keeps each of the eight comes from; 0x80: a
// zero.
struct Expansions {
  alignas(64) uint8_t of[256][8];
};
constexpr Expansions make_expansions() {
  Expansions all{};
  for (unsigned mask = 0; mask < 256; ++mask) {
    uint8_t next = 0;
    for (unsigned i = 0; i < 8; ++i) all.of[mask][i] = mask >> i & 1 ? next++ : uint8_t{0x80};
  }
  return all;
}
constexpr Expansions kExpansions = make_expansions();

constexpr size_t kQuadBytes = kBlock * kQuad;  // of integers, one each, if none is missing
constexpr size_t kQuadsAtOnce = 32;
constexpr size_t kAhead = 1024;  // bytes that are fetched before they are needed

// Integers of some quads as bytes, without the zeros between them.
struct Spread {
  alignas(64) uint8_t bytes[(kQuadsAtOnce + 1) * kQuadBytes];
  const uint8_t* starts[kQuadsAtOnce];

  // From the masks and values of `count` quads; returns the values behind them. piece(from, to) makes bytes
  // of a whole quad, of 64 bytes where the integers are wide and else of 32.
  template <bool kWide, class Piece>
  const uint8_t* fill(const Weight& w, const uint8_t* masks, const uint8_t* values, size_t count, Piece piece) {
    uint8_t last[kQuadBytes] = {};
    uint8_t* to = bytes;
    for (size_t i = 0; i < count; ++i) {
      uint64_t mask;
      __builtin_memcpy(&mask, masks + i * sizeof mask, sizeof mask);
      const auto found = static_cast<size_t>(__builtin_popcountll(mask));
      const size_t size = kWide ? found : (found + 1) / 2;
      const uint8_t* from = values;
      if (static_cast<size_t>(w.values_end - values) < kQuadBytes) {  // no byte behind the last is read
        for (size_t j = 0; j < size; ++j) last[j] = values[j];
        from = last;
      }
      __builtin_prefetch(values + kAhead);
      piece(from, to);
      values += size;
      starts[i] = to;
      to += found;
    }
    return values;
  }
};

}  // namespace
}  // namespace sparse_ops::nbits
