// What tasks that run a kernel share. Not for sources that are compiled for wide vectors.
#pragma once

#include <algorithm>

#include "kernels/sizes.h"
#include "kernels/spmm/kernel.h"

namespace sparse_ops::spmm {

// Panels that are in memory at a time: few, so that they are still in the second-level cache when they are
// read, but enough to give every processor a task.
constexpr size_t kPanelBytes = size_t{1} << 20;
constexpr size_t kMaxPanelBytes = size_t{32} << 20;
constexpr size_t kSlice = 64;  // input channels transposed by one task

// Floats that `rows` rows of a tile take. What follows begins at a cache line, so that no vector straddles
// two.
inline size_t panel_size(const Kernel& kernel, size_t rows) {
  return round_up(kernel.tile * rows, kCacheLine / sizeof(float));
}

// Blocks of Y: where the weight is gated, each is made of two.
inline size_t output_blocks(const Weight& weight) { return weight.gated ? weight.blocks / 2 : weight.blocks; }

// How many tiles have their panels in memory at a time; a multiple of `busy`, which many keep all processors
// busy, where there are so many.
inline size_t tiles_at_once(size_t tiles, size_t panel_bytes, size_t busy) {
  const size_t wanted = round_up(std::max(kPanelBytes / panel_bytes, busy), busy);
  const size_t possible = std::max<size_t>(1, kMaxPanelBytes / panel_bytes);
  return std::min({wanted, possible, std::max<size_t>(1, tiles)});
}

// Whether tiles keep every processor busy if each is one task.
inline bool tiles_are_enough(size_t tiles) { return tiles % processors() == 0 || tiles >= 4 * processors(); }

// acc *= the block of a gated weight that belongs to `block`, its gate.
inline void apply_gate(const Kernel& kernel, const Weight& weight, size_t block, const float* panel,
                       float* acc) {
  alignas(kCacheLine) float factor[kMaxAccumulators];
  kernel.multiply(weight, block + output_blocks(weight), panel, factor);
  for (size_t i = 0; i < weight.block * kernel.tile; ++i) acc[i] *= factor[i];
}

// A block of Y in one tile, activated: acc [block, tile], 64-byte aligned. Rows of channels behind N hold
// anything.
inline void compute_block(const Kernel& kernel, const Weight& weight, size_t block, const float* panel,
                          float* acc) {
  const size_t channels = std::min(weight.block, weight.N - block * weight.block);
  kernel.multiply(weight, block, panel, acc);
  kernel.activate(weight.activation, acc, channels * kernel.tile);
  if (weight.gated) apply_gate(kernel, weight, block, panel, acc);
}

}  // namespace sparse_ops::spmm
