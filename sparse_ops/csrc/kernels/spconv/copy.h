// Copying rows of images.
#pragma once

#include <cstddef>
#include <cstring>

namespace sparse_ops::spconv {

// Row lengths are small and vary: steps of a fixed size, the last one overlapping, beat a call of memcpy.
template <size_t kStep>
inline void copy_steps(const float* from, size_t count, float* to) {
  size_t i = 0;
  for (; i + kStep <= count; i += kStep) std::memcpy(to + i, from + i, kStep * sizeof(float));
  if (i != count) std::memcpy(to + count - kStep, from + count - kStep, kStep * sizeof(float));
}

inline void copy_row(const float* from, size_t count, float* to) {
  if (count >= 16) return copy_steps<16>(from, count, to);
  if (count >= 8) return copy_steps<8>(from, count, to);
  if (count >= 4) return copy_steps<4>(from, count, to);
  for (size_t i = 0; i < count; ++i) to[i] = from[i];
}

}  // namespace sparse_ops::spconv
