// Copying pieces of images to panels. Included like generic.h.
#pragma once

#include "kernels/spconv/kernel.h"
#include "kernels/vector.h"

namespace sparse_ops::spconv {
namespace {

// Pieces begin anywhere, so that vectors of a cache line would cross one each: half of it is the most.

// Lengths are small and vary: the last vector overlaps the one before, and what is shorter takes narrower
// ones.
template <size_t kLanes>
inline void copy_run(const float* from, size_t count, float* to) {
  if constexpr (kLanes < 4) {
    for (size_t i = 0; i < count; ++i) to[i] = from[i];
  } else {
    if (count < kLanes) return copy_run<kLanes / 2>(from, count, to);
    size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store<kLanes>(to + i, load<kLanes>(from + i));
    if (i < count) store<kLanes>(to + count - kLanes, load<kLanes>(from + count - kLanes));
  }
}

// Lanes kFirst, kFirst + 2, .. of `a` followed by `b`.
template <size_t kLanes, size_t kFirst, size_t... kIndices>
inline Vector<kLanes> every_second(Vector<kLanes> a, Vector<kLanes> b, std::index_sequence<kIndices...>) {
  return pick<kLanes, (kFirst + 2 * kIndices)...>(a, b);
}
template <size_t kLanes, size_t kFirst>
inline Vector<kLanes> every_second(Vector<kLanes> a, Vector<kLanes> b) {
  return every_second<kLanes, kFirst>(a, b, std::make_index_sequence<kLanes>());
}

// Every `stride`-th element; of two vectors, which end before the last one that is wanted, every second.
template <size_t kLanes>
inline void copy_strided_run(const float* from, size_t count, size_t stride, float* to) {
  size_t i = 0;
  if constexpr (kLanes >= 4) {
    for (; stride == 2 && i + kLanes < count; i += kLanes) {
      const Vector<kLanes> a = load<kLanes>(from + 2 * i), b = load<kLanes>(from + 2 * i + kLanes);
      store<kLanes>(to + i, every_second<kLanes, 0>(a, b));
    }
  }
  for (; i < count; ++i) to[i] = from[i * stride];
}

template <size_t kLanes>
void copy_pieces(const Pieces& p, const float* from, size_t plane, size_t channels, size_t rows, float* panel) {
  for (size_t channel = 0; channel < channels; ++channel, from += plane, panel += rows) {
    for (const Piece* piece = p.pieces; piece < p.pieces + p.count; ++piece) {
      if (piece->outside) {
        copy_run<kLanes>(p.outside, piece->count, panel + piece->to);
      } else if (p.stride == 1) {
        copy_run<kLanes>(from + piece->from, piece->count, panel + piece->to);
      } else {
        copy_strided_run<kLanes>(from + piece->from, piece->count, p.stride, panel + piece->to);
      }
    }
  }
}

}  // namespace
}  // namespace sparse_ops::spconv
