#include "kernels/spmm/spmm.h"

#include <algorithm>
#include <cstring>

#include "kernels/sizes.h"
#include "kernels/spmm/table.h"
#include "kernels/spmm/tasks.h"

namespace sparse_ops::spmm {
namespace {

constexpr Table<Kernel> kChosen = without_reference<Kernel>(kKernels);

bool same_set(const Kernel& a, const Kernel& b) {
  return &instruction_set(a.needs) == &instruction_set(b.needs);
}

// Everything that the tasks of one strip of tokens need.
struct Strip {
  const Tokens& tokens;
  const Weight& weight;
  std::span<const Output> outputs;
  float* panels;

  float* panel(size_t tile) const { return panels + panel_size(*tokens.plan.full, weight.K) * tile; }
};

void transpose_task(void* context, size_t index) {
  const Strip& strip = *static_cast<const Strip*>(context);
  const size_t tile = index / strip.tokens.slices();
  strip.tokens.transpose(tile, index % strip.tokens.slices(), strip.panel(tile));
}

// A block of Y in one tile, activated, from accumulators to the output that has its columns.
void store(const Strip& strip, size_t tile, size_t block, const float* acc) {
  const auto [output, channel] = place_of(strip.outputs, block, strip.weight.block);
  const Tokens& tokens = strip.tokens;
  tokens.kernel(tile).store_tokens(acc, std::min(strip.weight.block, output.channels - channel),
                                   tokens.in_tile(tile), output.channels,
                                   output.y + tokens.row(tile) * output.channels + channel);
}

void multiply(const Strip& strip, size_t tile, size_t block) {
  alignas(kCacheLine) float acc[kMaxAccumulators];
  compute_block(strip.tokens.kernel(tile), strip.weight, block, strip.panel(tile), acc);
  store(strip, tile, block, acc);
}

// Neighbouring tasks share a block of the weight, which then comes from the cache: it is read from memory
// once.
void multiply_task(void* context, size_t index) {
  const Strip& strip = *static_cast<const Strip*>(context);
  multiply(strip, index % strip.tokens.tiles(), index / strip.tokens.tiles());
}

// Whether whole tiles are tasks: if they keep all threads busy, the panel of a tile then stays with the one
// that made it. With few entries, panels that travel between processors cost more than a weight that each of
// them reads.
bool tiles_are_tasks(const Weight& weight, size_t tiles, size_t threads) {
  const bool few_entries = weight.entries * weight.width < weight.K * weight.N / 4;
  return few_entries && tiles_are_enough(tiles, threads);
}

// One tile from its activations to its outputs.
void tile_task(void* context, size_t tile) {
  const Strip& strip = *static_cast<const Strip*>(context);
  for (size_t slice = 0; slice < strip.tokens.slices(); ++slice) {
    strip.tokens.transpose(tile, slice, strip.panel(tile));
  }
  for (size_t block = 0; block < output_blocks(strip.weight); ++block) multiply(strip, tile, block);
}

Plan make_plan(const Weight& weight, size_t tokens, const Kernel& full, const Kernel& last, size_t threads) {
  const size_t panel_bytes = panel_size(full, weight.K) * sizeof(float);
  const size_t tiles = divide_up(tokens, full.tile);
  const size_t busy =
      tiles_are_tasks(weight, tiles, threads) ? threads : divide_up(threads, output_blocks(weight));
  return plan_strips(full, last, tokens, panel_bytes, busy, threads);
}

}  // namespace

Table<Kernel> kernels() { return kKernels; }

const Kernel* find_kernel(const char* name) {
  for (const Kernel* kernel : kKernels) {
    if (std::strcmp(kernel->name, name) == 0) return kernel;
  }
  return nullptr;
}

bool fits(const Kernel& kernel, const Weight& weight) {
  return weight.chunk <= kernel.max_chunk && weight.width <= kernel.max_width &&
         kernel.tile * weight.block <= kMaxAccumulators;
}

const Kernel* select(Table<Kernel> table, Features features, const Weight& weight, size_t tokens) {
  // Activations of one chunk that spill from the first-level cache cost more than a narrower tile, and the
  // panel of one tile must stay small however large K is.
  const size_t cache = static_cast<size_t>(l1_cache_bytes()) / sizeof(float);
  const size_t memory = kMaxPanelBytes / sizeof(float);
  const Kernel* best = nullptr;
  const Kernel* narrowest = nullptr;
  for (const Kernel* kernel : table) {  // of one instruction set: from wide tiles to narrow ones
    if (!is_there(*kernel, features) || !fits(*kernel, weight)) continue;
    if (narrowest != nullptr && (!same_set(*kernel, *narrowest) || kernel->tile == narrowest->tile)) continue;
    narrowest = kernel;
    if (kernel->tile * weight.chunk > cache || kernel->tile * weight.K > memory) continue;
    const bool better_for_wide = best != nullptr && weight.width > 1 && kernel->tile <= tokens &&
                                 kernel->wide_vectors > best->wide_vectors;
    if (best == nullptr || kernel->tile >= tokens || better_for_wide) best = kernel;
  }
  return best != nullptr ? best : narrowest;
}

const Kernel& select_kernel(Features features, const Weight& weight, size_t tokens) {
  return choose_permitted(features, [&](Features f) { return select(kChosen, f, weight, tokens); });
}

const Kernel& select_last(const Kernel& full, Features features, const Weight& weight, size_t tokens) {
  return choose_permitted(features, [&](Features f) {
    const Kernel* best = &full;
    for (const Kernel* kernel : kChosen) {
      if (!is_there(*kernel, f) || !same_set(*kernel, full) || !fits(*kernel, weight)) continue;
      if (kernel->tile >= tokens && kernel->tile < best->tile) best = kernel;
    }
    return best;
  });
}

Plan make_plan(const Weight& weight, size_t tokens, Features features, size_t threads) {
  const Kernel& full = select_kernel(features, weight, tokens);
  return make_plan(weight, tokens, full, select_last(full, features, weight, tokens % full.tile), threads);
}

Plan make_plan(const Weight& weight, size_t tokens, const Kernel& kernel, size_t threads) {
  return make_plan(weight, tokens, kernel, kernel, threads);
}

bool run(const Plan& plan, const Weight& weight, const float* x, std::span<const Output> outputs,
         void* scratch, Workers& workers) {
  return for_each_strip(plan, x, weight.K, scratch, [&](const Tokens& tokens, float* panels) {
    Strip strip{tokens, weight, outputs, panels};
    const size_t tiles = tokens.tiles();
    if (tiles_are_tasks(weight, tiles, plan.threads)) return workers.run(tiles, tile_task, &strip);
    return workers.run(tiles * tokens.slices(), transpose_task, &strip) &&
           workers.run(tiles * output_blocks(weight), multiply_task, &strip);
  });
}

bool run(const Plan& plan, const Weight& weight, const float* x, float* y, void* scratch, Workers& workers) {
  const Output output = {y, weight.gated ? weight.N / 2 : weight.N};
  return run(plan, weight, x, std::span(&output, 1), scratch, workers);
}

}  // namespace sparse_ops::spmm
