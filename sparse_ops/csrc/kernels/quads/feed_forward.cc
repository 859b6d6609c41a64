#include "kernels/quads/feed_forward.h"

#include <cstring>

#include "kernels/quads/tasks.h"

namespace sparse_ops::quads {
namespace {

// Quads of what is between the two that one task rounds.
constexpr size_t kSlice = 192;

// A weight that is as demanding as each of the two: what a kernel for both must take.
Weight larger(const Weight& first, const Weight& second) {
  Weight weight = second;
  weight.block = std::max(first.block, second.block);
  return weight;
}

// Words of what is in memory for one tile: the panel of X, what is between the two as floats [outputs, tile]
// with room for whole blocks, the extremes of every block of it, and its panel.
struct Layout {
  size_t hidden, extremes, panel, size;
  Layout(const Kernel& kernel, const Weight& first, const Weight& second) {
    const size_t blocks = output_blocks(first);
    hidden = panel_size(kernel, first);
    extremes = hidden + round_up(kernel.tile * blocks * first.block, kLineWords);
    panel = extremes + round_up(kernel.tile * blocks * kExtremes, kLineWords);
    size = panel + panel_size(kernel, second);
  }
};

// Everything that the tasks of one strip of tokens need.
struct Strip {
  const Tokens& tokens;
  const Weight& first;
  const Weight& second;
  const Layout& layout;
  float* y;
  int32_t* memory;

  int32_t* panel(size_t tile) const { return memory + layout.size * tile; }
  float* hidden(size_t tile) const { return reinterpret_cast<float*>(panel(tile) + layout.hidden); }
  float* extremes(size_t tile) const { return reinterpret_cast<float*>(panel(tile) + layout.extremes); }
  int32_t* hidden_panel(size_t tile) const { return panel(tile) + layout.panel; }
  size_t slices() const { return divide_up(second.quads, kSlice); }
};

void round_tokens(const Strip& strip, size_t tile, size_t group) {
  strip.tokens.round(strip.first, tile, group, strip.panel(tile));
}

// Accumulators lie as what is read from later, so that a block is computed in its place.
void compute_hidden(const Strip& strip, size_t tile, size_t block) {
  const Kernel& kernel = strip.tokens.kernel(tile);
  const size_t size = strip.first.block * kernel.tile;
  float* to = strip.hidden(tile) + block * size;
  float* extremes = strip.extremes(tile) + block * kExtremes * kernel.tile;
  if (size % kLineWords == 0) {
    const size_t channels = compute_block(kernel, strip.first, block, strip.panel(tile), to);
    return kernel.find_extremes(to, channels, extremes);
  }
  alignas(kCacheLine) float acc[kMaxAccumulators];  // kernels align their stores
  const size_t channels = compute_block(kernel, strip.first, block, strip.panel(tile), acc);
  kernel.find_extremes(acc, channels, extremes);
  std::memcpy(to, acc, size * sizeof(float));
}

void round_hidden(const Strip& strip, size_t tile, size_t slice) {
  const size_t begin = slice * kSlice, end = std::min(begin + kSlice, strip.second.quads);
  strip.tokens.kernel(tile).round_rows(strip.second, strip.hidden(tile), strip.extremes(tile),
                                       output_blocks(strip.first), begin, end, strip.hidden_panel(tile));
}

void compute_output(const Strip& strip, size_t tile, size_t block) {
  const Kernel& kernel = strip.tokens.kernel(tile);
  const Weight& weight = strip.second;
  alignas(kCacheLine) float acc[kMaxAccumulators];
  const size_t channels = compute_block(kernel, weight, block, strip.hidden_panel(tile), acc);
  kernel.store_tokens(acc, channels, strip.tokens.in_tile(tile), weight.N,
                      strip.y + strip.tokens.row(tile) * weight.N + block * weight.block);
}

// `steps` of every tile. Neighbouring tasks are the same step of all tiles: a block of the weight is read
// once.
template <void (*kStep)(const Strip&, size_t tile, size_t step)>
bool run_steps(const Strip& strip, size_t steps, Workers& workers) {
  const auto task = [](void* context, size_t index) {
    const Strip& own = *static_cast<const Strip*>(context);
    kStep(own, index % own.tokens.tiles(), index / own.tokens.tiles());
  };
  return workers.run(strip.tokens.tiles() * steps, task, const_cast<Strip*>(&strip));
}

Plan plan_of(const Weight& first, const Weight& second, size_t tokens, const Kernel& full, const Kernel& last,
             size_t threads) {
  const size_t bytes = Layout(full, first, second).size * sizeof(int32_t);
  const size_t blocks = std::min(output_blocks(first), second.blocks);
  return plan_strips(tokens, full, last, bytes, blocks, threads);
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
  return plan_of(first, second, tokens, full, select_last(full, both, tokens % full.tile), threads);
}

Plan make_plan(const Weight& first, const Weight& second, size_t tokens, const Kernel& kernel,
               size_t threads) {
  return plan_of(first, second, tokens, kernel, kernel, threads);
}

bool run(const Plan& plan, const Weight& first, const Weight& second, const float* x, float* y, void* scratch,
         Workers& workers) {
  const Layout layout(*plan.full, first, second);
  return for_each_strip(plan, Input{x, {}}, scratch, [&](const Tokens& tokens, int32_t* memory) {
    const Strip strip{tokens, first, second, layout, y, memory};
    return run_steps<round_tokens>(strip, tokens.groups(), workers) &&
           run_steps<compute_hidden>(strip, output_blocks(first), workers) &&
           run_steps<round_hidden>(strip, strip.slices(), workers) &&
           run_steps<compute_output>(strip, second.blocks, workers);
  });
}

}  // namespace sparse_ops::quads
