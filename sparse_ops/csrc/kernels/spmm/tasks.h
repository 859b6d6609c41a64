// What tasks that run a kernel share. Not for sources that are compiled for wide vectors.
#pragma once

#include <algorithm>

#include "kernels/sizes.h"
#include "kernels/spmm/spmm.h"

namespace sparse_ops::spmm {

// Panels that are in memory at a time: few, so that they are still in the second-level cache when they are
// read, but enough to give every thread a task.
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

// Of all tokens, as many tiles at a time as may have their panels in memory, `panel_bytes` each; a multiple
// of `busy` tiles, which are enough for all `threads`, unless there are fewer.
inline Plan plan_strips(const Kernel& full, const Kernel& last, size_t tokens, size_t panel_bytes,
                        size_t busy, size_t threads) {
  const size_t wanted = round_up(std::max(kPanelBytes / panel_bytes, busy), busy);
  const size_t possible = std::max<size_t>(1, kMaxPanelBytes / panel_bytes);
  const size_t at_once = std::min({wanted, possible, std::max<size_t>(1, divide_up(tokens, full.tile))});
  return {&full, &last, tokens, at_once * full.tile, at_once * panel_bytes + kCacheLine, threads};
}

// The tokens of one strip, in tiles.
struct Tokens {
  const Plan& plan;
  const float* x;  // [plan.tokens, K], row-major
  size_t K;
  size_t first, count;  // among all

  size_t tiles() const { return divide_up(count, plan.full->tile); }
  size_t slices() const { return divide_up(K, kSlice); }
  size_t row(size_t tile) const { return first + tile * plan.full->tile; }  // of x and of the outputs
  size_t in_tile(size_t tile) const { return std::min(plan.full->tile, count - tile * plan.full->tile); }
  const Kernel& kernel(size_t tile) const {
    return in_tile(tile) < plan.full->tile ? *plan.last : *plan.full;
  }
  void transpose(size_t tile, size_t slice, float* panel) const {
    const size_t begin = slice * kSlice;
    kernel(tile).transpose(x + row(tile) * K, in_tile(tile), K, begin, std::min(begin + kSlice, K), panel);
  }
};

// run_strip(tokens, panels) for every strip of a plan, until it gives false.
template <class RunStrip>
bool for_each_strip(const Plan& plan, const float* x, size_t K, void* scratch, RunStrip run_strip) {
  float* panels = reinterpret_cast<float*>(round_up(reinterpret_cast<uintptr_t>(scratch), kCacheLine));
  for (size_t first = 0; first < plan.tokens; first += plan.strip) {
    if (!run_strip(Tokens{plan, x, K, first, std::min(plan.strip, plan.tokens - first)}, panels))
      return false;
  }
  return true;
}

// Whether tiles keep all threads busy if each is one task.
inline bool tiles_are_enough(size_t tiles, size_t threads) {
  return tiles % threads == 0 || tiles >= 4 * threads;
}

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
