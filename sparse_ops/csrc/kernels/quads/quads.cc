#include "kernels/quads/quads.h"

#include <algorithm>
#include <cstdint>

#include "kernels/quads/table.h"
#include "kernels/sizes.h"

namespace sparse_ops::quads {
namespace {

constexpr Table<Kernel> kChosen = without_reference<Kernel>(kKernels);

// Panels that are in memory at a time: few, so that they are still in the second-level cache when they are
// read, but enough to give every thread a task.
constexpr size_t kPanelBytes = size_t{1} << 19;

// Words of a panel; what follows begins at a cache line.
size_t panel_size(const Kernel& kernel, const Weight& weight) {
  return round_up(kernel.tile * panel_rows(weight.quads), kCacheLine / sizeof(int32_t));
}

// Blocks of Y: where the weight is gated, each is made of two.
size_t output_blocks(const Weight& weight) { return weight.gated ? weight.blocks / 2 : weight.blocks; }

// The tokens of one strip, in tiles.
struct Strip {
  const Plan& plan;
  const Weight& weight;
  const float* floats;  // [plan.tokens, K], or nullptr:
  Bytes bytes;          // of the same shape
  std::span<const Output> outputs;
  int32_t* panels;
  size_t first, count;  // among all

  size_t tiles() const { return divide_up(count, plan.full->tile); }
  size_t groups() const { return divide_up(plan.full->tile, kGroup); }
  size_t row(size_t tile) const { return first + tile * plan.full->tile; }  // of x and y
  size_t in_tile(size_t tile) const { return std::min(plan.full->tile, count - tile * plan.full->tile); }
  const Kernel& kernel(size_t tile) const {
    return in_tile(tile) < plan.full->tile ? *plan.last : *plan.full;
  }
  int32_t* panel(size_t tile) const { return panels + panel_size(*plan.full, weight) * tile; }

  void round(size_t tile, size_t group) const {
    const Kernel& own = kernel(tile);
    if (group * kGroup >= own.tile) return;
    const size_t at = row(tile) * weight.K;
    if (floats != nullptr) return own.round(weight, floats + at, in_tile(tile), group * kGroup, panel(tile));
    Bytes of_tile = bytes;
    of_tile.data += at;
    own.pack(weight, of_tile, in_tile(tile), group * kGroup, panel(tile));
  }

  // A block of X . W + bias, and how many outputs it has.
  size_t add_up(size_t tile, size_t block, float* acc) const {
    const size_t channels = std::min(weight.block, weight.N - block * weight.block);
    kernel(tile).multiply(weight, block, panel(tile), acc);
    if (weight.grid.size != 0) kernel(tile).settle(weight, block, channels, acc);
    return channels;
  }

  void apply_gate(size_t tile, size_t block, float* acc) const {
    alignas(kCacheLine) float factor[kMaxAccumulators];
    const size_t size = add_up(tile, block + output_blocks(weight), factor) * kernel(tile).tile;
    for (size_t i = 0; i < size; ++i) acc[i] *= factor[i];
  }

  void multiply(size_t tile, size_t block) const {
    alignas(kCacheLine) float acc[kMaxAccumulators];
    const Kernel& own = kernel(tile);
    const size_t channels = add_up(tile, block, acc);
    own.activate(weight.activation, acc, channels * own.tile);
    if (weight.gated) apply_gate(tile, block, acc);
    const auto [output, channel] = spmm::place_of(outputs, block, weight.block);
    own.store_tokens(acc, channels, in_tile(tile), output.channels,
                     output.y + row(tile) * output.channels + channel);
  }
};

Output all_of(const Weight& weight, float* y) { return {y, weight.gated ? weight.N / 2 : weight.N}; }

void round_task(void* context, size_t index) {
  const Strip& strip = *static_cast<const Strip*>(context);
  strip.round(index / strip.groups(), index % strip.groups());
}

// Neighbouring tasks share a block of the weight, which then comes from the cache: it is read from memory
// once.
void multiply_task(void* context, size_t index) {
  const Strip& strip = *static_cast<const Strip*>(context);
  strip.multiply(index % strip.tiles(), index / strip.tiles());
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
  const size_t busy = divide_up(threads, weight.blocks);
  const size_t wanted = round_up(std::max(kPanelBytes / panel_bytes, busy), busy);
  const size_t at_once = std::min(wanted, std::max<size_t>(1, divide_up(tokens, full.tile)));
  return {&full, &last, tokens, at_once * full.tile, at_once * panel_bytes + kCacheLine, threads};
}

bool run(const Plan& plan, const Weight& weight, const float* floats, const Bytes& bytes,
         std::span<const Output> outputs, void* scratch, Workers& workers) {
  auto* panels = reinterpret_cast<int32_t*>(round_up(reinterpret_cast<uintptr_t>(scratch), kCacheLine));
  for (size_t first = 0; first < plan.tokens; first += plan.strip) {
    const size_t count = std::min(plan.strip, plan.tokens - first);
    Strip strip{plan, weight, floats, bytes, outputs, panels, first, count};
    const size_t tiles = strip.tiles();
    if (!workers.run(tiles * strip.groups(), round_task, &strip)) return false;
    if (!workers.run(tiles * output_blocks(weight), multiply_task, &strip)) return false;
  }
  return true;
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
  return run(plan, weight, x, {}, outputs, scratch, workers);
}

bool run(const Plan& plan, const Weight& weight, const Bytes& x, std::span<const Output> outputs,
         void* scratch, Workers& workers) {
  return run(plan, weight, nullptr, x, outputs, scratch, workers);
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
