#include "kernels/spmm/feed_forward.h"

#include <algorithm>
#include <cstring>

#include "kernels/spmm/tasks.h"

namespace sparse_ops::spmm {
namespace {

constexpr size_t kLineFloats = kCacheLine / sizeof(float);

// A weight that is as demanding as each of the two: what a kernel for both must take.
Weight larger(const Weight& first, const Weight& second) {
  Weight weight = second;
  weight.K = std::max(first.K, second.K);
  weight.chunk = std::max(first.chunk, second.chunk);
  weight.block = std::max(first.block, second.block);
  weight.width = std::max(first.width, second.width);
  return weight;
}

// Floats of the panel between the two, with room for whole blocks.
size_t hidden_size(const Kernel& kernel, const Weight& first) {
  return panel_size(kernel, output_blocks(first) * first.block);
}

// Everything that the tasks of one strip of tokens need.
struct Strip {
  const Tokens& tokens;
  const Weight& first;
  const Weight& second;
  float* y;
  float* panels;

  float* panel(size_t tile) const {
    const Kernel& kernel = *tokens.plan.full;
    return panels + tile * (panel_size(kernel, first.K) + hidden_size(kernel, first));
  }
  float* hidden(size_t tile) const { return panel(tile) + panel_size(*tokens.plan.full, first.K); }
};

void transpose(const Strip& strip, size_t tile, size_t slice) {
  strip.tokens.transpose(tile, slice, strip.panel(tile));
}

// Accumulators and panels have the same layout, so that a block is computed where it is read from later.
void compute_hidden(const Strip& strip, size_t tile, size_t block) {
  const Kernel& kernel = strip.tokens.kernel(tile);
  const size_t size = strip.first.block * kernel.tile;
  float* to = strip.hidden(tile) + block * size;
  if (size % kLineFloats == 0) {
    compute_block(kernel, strip.first, block, strip.panel(tile), to);
  } else {  // kernels align their stores, and may reach into what follows
    alignas(kCacheLine) float acc[kMaxAccumulators];
    compute_block(kernel, strip.first, block, strip.panel(tile), acc);
    std::memcpy(to, acc, size * sizeof(float));
  }
}

void compute_output(const Strip& strip, size_t tile, size_t block) {
  const Kernel& kernel = strip.tokens.kernel(tile);
  const Weight& weight = strip.second;
  const size_t channel = block * weight.block;
  alignas(kCacheLine) float acc[kMaxAccumulators];
  compute_block(kernel, weight, block, strip.hidden(tile), acc);
  kernel.store_tokens(acc, std::min(weight.block, weight.N - channel), strip.tokens.in_tile(tile), weight.N,
                      strip.y + strip.tokens.row(tile) * weight.N + channel);
}

// `steps` of each tile, one tile after the other.
template <void (*kStep)(const Strip&, size_t tile, size_t step)>
bool run_steps(const Strip& strip, size_t steps, Workers& workers) {
  struct Context {
    const Strip& strip;
    size_t steps;
  } context{strip, steps};
  const auto task = [](void* c, size_t index) {
    const Context& work = *static_cast<const Context*>(c);
    kStep(work.strip, index / work.steps, index % work.steps);
  };
  return workers.run(strip.tokens.tiles() * steps, task, &context);
}

// One tile from its activations to its outputs: they stay with the processor that computes them.
void tile_task(void* context, size_t tile) {
  const Strip& strip = *static_cast<const Strip*>(context);
  for (size_t slice = 0; slice < strip.tokens.slices(); ++slice) transpose(strip, tile, slice);
  for (size_t block = 0; block < output_blocks(strip.first); ++block) compute_hidden(strip, tile, block);
  for (size_t block = 0; block < strip.second.blocks; ++block) compute_output(strip, tile, block);
}

Plan make_plan(const Weight& first, size_t tokens, const Kernel& full, const Kernel& last, size_t threads) {
  const size_t panel_bytes = (panel_size(full, first.K) + hidden_size(full, first)) * sizeof(float);
  const size_t busy = tiles_are_enough(divide_up(tokens, full.tile), threads) ? threads : 1;
  return plan_strips(full, last, tokens, panel_bytes, busy, threads);
}

}  // namespace

bool fits(const Kernel& kernel, const Weight& first, const Weight& second) {
  return fits(kernel, larger(first, second));
}

const Kernel& select_kernel(Features features, const Weight& first, const Weight& second, size_t tokens) {
  return select_kernel(features, larger(first, second), tokens);
}

Plan make_plan(const Weight& first, const Weight& second, size_t tokens, Features features, size_t threads) {
  const Weight both = larger(first, second);
  const Kernel& full = select_kernel(features, both, tokens);
  return make_plan(first, tokens, full, select_last(full, features, both, tokens % full.tile), threads);
}

Plan make_plan(const Weight& first, const Weight&, size_t tokens, const Kernel& kernel, size_t threads) {
  return make_plan(first, tokens, kernel, kernel, threads);
}

bool run(const Plan& plan, const Weight& first, const Weight& second, const float* x, float* y, void* scratch,
         Workers& workers) {
  return for_each_strip(plan, x, first.K, scratch, [&](const Tokens& tokens, float* panels) {
    Strip strip{tokens, first, second, y, panels};
    if (tiles_are_enough(tokens.tiles(), plan.threads)) return workers.run(tokens.tiles(), tile_task, &strip);
    return run_steps<transpose>(strip, tokens.slices(), workers) &&
           run_steps<compute_hidden>(strip, output_blocks(first), workers) &&
           run_steps<compute_output>(strip, second.blocks, workers);
  });
}

}  // namespace sparse_ops::spmm
