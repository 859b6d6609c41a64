// What tasks that run a kernel share. Not for sources that are compiled for wide vectors.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/quads/quads.h"
#include "kernels/sizes.h"

namespace sparse_ops::quads {

// Panels that are in memory at a time: few, so that they are still in the second-level cache when they are
// read, but enough to give every thread a task.
constexpr size_t kPanelBytes = size_t{1} << 19;

constexpr size_t kLineWords = kCacheLine / sizeof(int32_t);

// Words of a panel; what follows begins at a cache line.
inline size_t panel_size(const Kernel& kernel, const Weight& weight) {
  return round_up(kernel.tile * panel_rows(weight.quads), kLineWords);
}

// Blocks of Y: where the weight is gated, each is made of two.
inline size_t output_blocks(const Weight& weight) { return weight.gated ? weight.blocks / 2 : weight.blocks; }

// Of all tokens, so many tiles at a time as have their panels, `panel_bytes` each, in the cache, and keep
// `threads` busy if each has so many `blocks`.
inline Plan plan_strips(size_t tokens, const Kernel& full, const Kernel& last, size_t panel_bytes,
                        size_t blocks, size_t threads) {
  const size_t busy = divide_up(threads, blocks);
  const size_t wanted = round_up(std::max(kPanelBytes / panel_bytes, busy), busy);
  const size_t at_once = std::min(wanted, std::max<size_t>(1, divide_up(tokens, full.tile)));
  return {&full, &last, tokens, at_once * full.tile, at_once * panel_bytes + kCacheLine, threads};
}

// X, of one of two types.
struct Input {
  const float* floats;  // [tokens, K], or nullptr:
  Bytes bytes;          // of the same shape
};

// The tokens of one strip, in tiles.
struct Tokens {
  const Plan& plan;
  const Input& x;
  size_t first, count;  // among all

  size_t tiles() const { return divide_up(count, plan.full->tile); }
  size_t groups() const { return divide_up(plan.full->tile, kGroup); }
  size_t row(size_t tile) const { return first + tile * plan.full->tile; }  // of x and of the outputs
  size_t in_tile(size_t tile) const { return std::min(plan.full->tile, count - tile * plan.full->tile); }
  const Kernel& kernel(size_t tile) const {
    return in_tile(tile) < plan.full->tile ? *plan.last : *plan.full;
  }

  void round(const Weight& weight, size_t tile, size_t group, int32_t* panel) const {
    const Kernel& own = kernel(tile);
    if (group * kGroup >= own.tile) return;
    const size_t at = row(tile) * weight.K;
    if (x.floats != nullptr) {
      return own.round(weight, x.floats + at, in_tile(tile), group * kGroup, panel);
    }
    Bytes of_tile = x.bytes;
    of_tile.data += at;
    own.pack(weight, of_tile, in_tile(tile), group * kGroup, panel);
  }
};

// run_strip(tokens, panels) for every strip of a plan, until it gives false.
template <class RunStrip>
bool for_each_strip(const Plan& plan, const Input& x, void* scratch, RunStrip run_strip) {
  auto* panels = reinterpret_cast<int32_t*>(round_up(reinterpret_cast<uintptr_t>(scratch), kCacheLine));
  for (size_t first = 0; first < plan.tokens; first += plan.strip) {
    if (!run_strip(Tokens{plan, x, first, std::min(plan.strip, plan.tokens - first)}, panels)) return false;
  }
  return true;
}

// A block of X . W + bias in one tile, and how many outputs it has.
inline size_t add_up(const Kernel& kernel, const Weight& weight, size_t block, const int32_t* panel,
                     float* acc) {
  const size_t channels = std::min(weight.block, weight.N - block * weight.block);
  kernel.multiply(weight, block, panel, acc);
  if (weight.grid.size != 0) kernel.settle(weight, block, channels, acc);
  return channels;
}

// acc *= the block of a gated weight that belongs to `block`, its gate.
inline void apply_gate(const Kernel& kernel, const Weight& weight, size_t block, const int32_t* panel,
                       float* acc) {
  alignas(kCacheLine) float factor[kMaxAccumulators];
  const size_t channels = add_up(kernel, weight, block + output_blocks(weight), panel, factor);
  for (size_t i = 0; i < channels * kernel.tile; ++i) acc[i] *= factor[i];
}

// A block of Y in one tile: acc [block, tile], 64-byte aligned. Returns how many outputs it has; the rows
// behind them hold anything.
inline size_t compute_block(const Kernel& kernel, const Weight& weight, size_t block, const int32_t* panel,
                            float* acc) {
  const size_t channels = add_up(kernel, weight, block, panel, acc);
  kernel.activate(weight.activation, acc, channels * kernel.tile);
  if (weight.gated) apply_gate(kernel, weight, block, panel, acc);
  return channels;
}

}  // namespace sparse_ops::quads
