#include "kernels/attention/attention.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstdint>

#include "kernels/attention/table.h"
#include "kernels/sizes.h"

namespace sparse_ops::attention {
namespace {

// Enough for the threads of any processor to share; the bits of a FreeScratch.
constexpr size_t kMostTasks = 64;
// Multiplications of one task at least: some microseconds of work, so that waking a thread for it pays.
constexpr size_t kTaskWork = 1 << 17;
// Elements of a mask that all heads share which are laid out once for all: 4 MiB.
constexpr size_t kSharedMask = 1 << 20;

size_t whole_lines(size_t floats) { return round_up(floats, kCacheLine / sizeof(float)); }

// Pieces of scratch, one bit each, for tasks that run at the same time. One that was just used is in the
// cache: a task takes the first that is free.
class FreeScratch {
 public:
  size_t take() {
    uint64_t free = free_.load(std::memory_order_relaxed);
    while (!free_.compare_exchange_weak(free, free & (free - 1), std::memory_order_acquire)) {
    }
    return static_cast<size_t>(std::countr_zero(free));
  }
  void give_back(size_t piece) { free_.fetch_or(uint64_t{1} << piece, std::memory_order_release); }

 private:
  std::atomic<uint64_t> free_ = ~uint64_t{0};
};

struct Plan {
  Plan(const Kernel& k, const Arguments& a);

  const Kernel& kernel;
  const Arguments& arguments;
  size_t vectors, strips;  // of queries; they share the vectors evenly
  size_t tiles = 0, per_task = 0;
  size_t masks = 0,
         mask_floats = 0;  // batches whose masks are laid out before: 0, 1 or all; size of one for one strip
  size_t scratch_floats = 0;  // of one task
  float *mask = nullptr, *scratch = nullptr;
  FreeScratch free_scratch;

  size_t tasks() const { return divide_up(tiles, per_task); }
  // Tiles are numbered by batch, then head, then strip.
  Tile tile(size_t index) const {
    const size_t strip = index % strips, first = strip * vectors / strips * kernel.lanes;
    const size_t end = std::min(arguments.queries, (strip + 1) * vectors / strips * kernel.lanes);
    return {index / strips / arguments.heads, index / strips % arguments.heads, first, end - first};
  }
  // Where the mask of a tile is laid out.
  float* mask_of(const Tile& tile, size_t strip) const {
    return mask + ((masks == 1 ? 0 : tile.batch) * strips + strip) * mask_floats;
  }
};

Plan::Plan(const Kernel& k, const Arguments& a)
    : kernel(k), arguments(a), vectors(divide_up(a.queries, k.lanes)), strips(divide_up(a.queries, k.tile)) {
  tiles = a.batches * a.heads * strips;
  const size_t work = a.queries * a.keys * (a.size + a.value_size) / std::max<size_t>(1, strips);
  per_task = std::max({size_t{1}, divide_up(tiles, kMostTasks), kTaskWork / std::max<size_t>(1, work)});
  mask_floats = a.keys * k.tile;
  if (a.mask.data != nullptr && a.mask.row != 0 && a.mask.head == 0 && a.heads > 1 &&
      a.queries > kFewQueries && k.lay_mask != nullptr) {
    masks = a.mask.batch == 0 ? 1 : a.batches;
    if (masks * strips * mask_floats > kSharedMask) masks = 0;
  }
  const size_t key_width = round_up(a.size, k.lanes), value_width = round_up(a.value_size, k.lanes);
  scratch_floats = whole_lines(k.tile * (a.size + 2 * kKeyBlock + 3 + value_width) +
                               kKeyBlock * (key_width + value_width) + kApart);
}

void mask_task(void* context, size_t index) {
  const Plan& plan = *static_cast<const Plan*>(context);
  const size_t strip = index % plan.strips;
  const Tile tile = plan.tile(index / plan.strips * plan.arguments.heads * plan.strips + strip);
  plan.kernel.lay_mask(plan.arguments, tile, plan.mask_of(tile, strip));
}

void task(void* context, size_t index) {
  Plan& plan = *static_cast<Plan*>(context);
  const size_t piece = plan.free_scratch.take();
  const size_t end = std::min((index + 1) * plan.per_task, plan.tiles);
  for (size_t i = index * plan.per_task; i < end; ++i) {
    const Tile tile = plan.tile(i);
    plan.kernel.run(plan.arguments, tile, plan.masks > 0 ? plan.mask_of(tile, i % plan.strips) : nullptr,
                    plan.scratch + piece * plan.scratch_floats);
  }
  plan.free_scratch.give_back(piece);
}

}  // namespace

Table<Kernel> kernels() { return kKernels; }

const Kernel& select_kernel(Features features) { return select_permitted<Kernel>(kKernels, features); }

size_t scratch_bytes(const Kernel& kernel, const Arguments& arguments) {
  const Plan plan(kernel, arguments);
  const size_t floats = plan.masks * plan.strips * plan.mask_floats + plan.tasks() * plan.scratch_floats;
  return floats * sizeof(float) + kCacheLine;
}

bool run(const Kernel& kernel, const Arguments& arguments, void* scratch, Workers& workers) {
  if (arguments.keys == 0) {
    const size_t rows = arguments.batches * arguments.queries;
    std::fill_n(arguments.y, rows * arguments.heads * arguments.value_size, 0.0f);
    return true;
  }
  Plan plan(kernel, arguments);
  const auto address = reinterpret_cast<uintptr_t>(scratch);
  plan.mask = reinterpret_cast<float*>((address + kCacheLine - 1) / kCacheLine * kCacheLine);
  plan.scratch = plan.mask + plan.masks * plan.strips * plan.mask_floats;
  const size_t masks = plan.masks * plan.strips, tasks = plan.tasks();
  const auto all = [&](size_t count, void (*act)(void*, size_t)) {
    if (count > 1) return workers.run(count, act, &plan);
    if (count == 1) act(&plan, 0);
    return true;
  };
  return all(masks, mask_task) && all(tasks, task);
}

}  // namespace sparse_ops::attention
