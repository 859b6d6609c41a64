#include "kernels/quads/quads.h"

#include <algorithm>

#include "kernels/quads/table.h"
#include "kernels/quads/tasks.h"

namespace sparse_ops::quads {
namespace {

constexpr Table<Kernel> kChosen = without_reference<Kernel>(kKernels);

// Everything that the tasks of one strip of tokens need.
struct Strip {
  const Tokens& tokens;
  const Weight& weight;
  std::span<const Output> outputs;
  int32_t* panels;

  int32_t* panel(size_t tile) const { return panels + panel_size(*tokens.plan.full, weight) * tile; }

  void multiply(size_t tile, size_t block) const {
    alignas(kCacheLine) float acc[kMaxAccumulators];
    const Kernel& kernel = tokens.kernel(tile);
    const size_t channels = compute_block(kernel, weight, block, panel(tile), acc);
    const auto [output, channel] = spmm::place_of(outputs, block, weight.block);
    kernel.store_tokens(acc, channels, tokens.in_tile(tile), output.channels,
                        output.y + tokens.row(tile) * output.channels + channel);
  }
};

Output all_of(const Weight& weight, float* y) { return {y, weight.gated ? weight.N / 2 : weight.N}; }

void round_task(void* context, size_t index) {
  const Strip& strip = *static_cast<const Strip*>(context);
  const size_t groups = strip.tokens.groups(), tile = index / groups;
  strip.tokens.round(strip.weight, tile, index % groups, strip.panel(tile));
}

// Neighbouring tasks share a block of the weight, which then comes from the cache: it is read from memory
// once.
void multiply_task(void* context, size_t index) {
  const Strip& strip = *static_cast<const Strip*>(context);
  strip.multiply(index % strip.tokens.tiles(), index / strip.tokens.tiles());
}

// The narrowest of the rows that need what `full` does, for fewer tokens than its tile has.
const Kernel& select_last(Table<Kernel> table, const Kernel& full, const Weight& weight, size_t tokens) {
  const Kernel* best = &full;
  for (const Kernel* kernel : table) {
    if (kernel->needs == full.needs && fits(*kernel, weight) && kernel->tile >= tokens &&
        kernel->tile < best->tile) {
      best = kernel;
    }
  }
  return *best;
}

// Columns of all panels that so many tokens take.
size_t columns(Table<Kernel> table, const Kernel& full, const Weight& weight, size_t tokens) {
  const size_t rest = tokens % full.tile;
  return tokens - rest + (rest > 0 ? select_last(table, full, weight, rest).tile : 0);
}

Plan plan_of(const Weight& weight, size_t tokens, const Kernel& full, const Kernel& last, size_t threads) {
  const size_t panel_bytes = panel_size(full, weight) * sizeof(int32_t);
  return plan_strips(tokens, full, last, panel_bytes, weight.blocks, threads);
}

bool run(const Plan& plan, const Weight& weight, const Input& x, std::span<const Output> outputs,
         void* scratch, Workers& workers) {
  return for_each_strip(plan, x, scratch, [&](const Tokens& tokens, int32_t* panels) {
    Strip strip{tokens, weight, outputs, panels};
    const size_t tiles = tokens.tiles();
    return workers.run(tiles * tokens.groups(), round_task, &strip) &&
           workers.run(tiles * output_blocks(weight), multiply_task, &strip);
  });
}

}  // namespace

Table<Kernel> kernels() { return kKernels; }

bool fits(const Kernel& kernel, const Weight& weight) {
  return kernel.tile * weight.block <= kMaxAccumulators;
}

const Kernel* select(Table<Kernel> table, Features features, const Weight& weight, size_t tokens) {
  const Kernel* best = nullptr;
  for (const Kernel* kernel : table) {  // of one set of features: from wide tiles to narrow ones
    if (!is_there(*kernel, features, int8) || !fits(*kernel, weight)) continue;
    if (best != nullptr && kernel->needs != best->needs) continue;
    if (best == nullptr || (kernel->tile >= tokens && 2 * kernel->tile <= best->tile)) {
      best = kernel;
    } else {
      // A narrow tile takes longer for a column: it must save a quarter of them.
      const size_t now = columns(table, *best, weight, tokens), then = columns(table, *kernel, weight, tokens);
      if (then <= now - now / 4) best = kernel;
    }
  }
  return best;
}

const Kernel& select_kernel(Features features, const Weight& weight, size_t tokens) {
  return choose_permitted(features, [&](Features f) {
    return select(kChosen, f, weight, tokens);
  });
}

const Kernel& select_last(const Kernel& full, const Weight& weight, size_t tokens) {
  return select_last(kChosen, full, weight, tokens);
}

Plan make_plan(const Weight& weight, size_t tokens, Features features, size_t threads) {
  const Kernel& full = select_kernel(features, weight, tokens);
  return plan_of(weight, tokens, full, select_last(full, weight, tokens % full.tile), threads);
}

Plan make_plan(const Weight& weight, size_t tokens, const Kernel& kernel, size_t threads) {
  return plan_of(weight, tokens, kernel, kernel, threads);
}

bool run(const Plan& plan, const Weight& weight, const float* x, std::span<const Output> outputs,
         void* scratch, Workers& workers) {
  return run(plan, weight, Input{x, {}}, outputs, scratch, workers);
}

bool run(const Plan& plan, const Weight& weight, const Bytes& x, std::span<const Output> outputs,
         void* scratch, Workers& workers) {
  return run(plan, weight, Input{nullptr, x}, outputs, scratch, workers);
}

bool run(const Plan& plan, const Weight& weight, const float* x, float* y, void* scratch, Workers& workers) {
  const Output output = all_of(weight, y);
  return run(plan, weight, x, std::span(&output, 1), scratch, workers);
}

bool run(const Plan& plan, const Weight& weight, const Bytes& x, float* y, void* scratch, Workers& workers) {
  const Output output = all_of(weight, y);
  return run(plan, weight, x, std::span(&output, 1), scratch, workers);
}

}  // namespace sparse_ops::quads
