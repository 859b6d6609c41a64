// Arithmetic of sizes that the drivers of the kernels share. Not for sources that are compiled for wide
// vectors.
#pragma once

#include <cstddef>

namespace sparse_ops {

constexpr size_t kCacheLine = 64;

constexpr size_t divide_up(size_t value, size_t step) { return (value + step - 1) / step; }
constexpr size_t round_up(size_t value, size_t step) { return divide_up(value, step) * step; }

}  // namespace sparse_ops
