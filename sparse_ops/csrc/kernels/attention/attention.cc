#include "kernels/attention/attention.h"

#include <algorithm>
#include <cstdint>

#include "kernels/attention/table.h"

namespace sparse_ops::attention {
namespace {

constexpr const Kernel* kKernels[] = {
#define ATTENTION_KERNEL(name) &name,
#include "kernels/attention/kernels.inc"
#undef ATTENTION_KERNEL
};

constexpr size_t kCacheLine = 64;
// Tasks, each with its scratch: enough for the threads of any processor to share.
constexpr size_t kMostTasks = 64;
// Multiplications of one task at least: some microseconds of work, so that waking a thread for it pays.
constexpr size_t kTaskWork = 1 << 17;

size_t ceil_div(size_t a, size_t b) { return (a + b - 1) / b; }

// Tiles are numbered by batch, then queries, then heads; a task takes `per_task` of them in a row, within which heads
// share what was made of a mask.
struct Plan {
  const Kernel& kernel;
  const Arguments& arguments;
  size_t strips, vectors;  // strips of queries, which share this many vectors
  size_t per_task, tasks;
  size_t scratch_floats;  // of one task
  float* scratch;
};

Plan make_plan(const Kernel& kernel, const Arguments& a) {
  const size_t vectors = ceil_div(a.queries, kernel.lanes), strips = ceil_div(a.queries, kernel.queries);
  const size_t tiles = a.batches * strips * a.heads;
  const size_t work = a.queries * a.keys * (a.size + a.value_size) / std::max<size_t>(1, strips);
  size_t per_task = ceil_div(tiles, kMostTasks);
  per_task = std::max({per_task, kTaskWork / std::max<size_t>(1, work), size_t{1}});
  const size_t floats = kernel.queries * (a.size + a.value_size + 2 * kKeyBlock + 3);
  const size_t lines = ceil_div(floats * sizeof(float), kCacheLine);
  return {kernel,   a,       strips, vectors, per_task, ceil_div(tiles, per_task), lines * kCacheLine / sizeof(float),
          nullptr};
}

void task(void* context, size_t index) {
  const Plan& plan = *static_cast<const Plan*>(context);
  const Arguments& a = plan.arguments;
  float* scratch = plan.scratch + index * plan.scratch_floats;
  const size_t end = std::min((index + 1) * plan.per_task, a.batches * plan.strips * a.heads);
  for (size_t at = index * plan.per_task; at < end;) {
    const size_t head = at % a.heads, strip = at / a.heads % plan.strips, batch = at / a.heads / plan.strips;
    const size_t head_end = std::min(a.heads, head + end - at);
    const size_t first = strip * plan.vectors / plan.strips * plan.kernel.lanes;
    const size_t last = std::min(a.queries, (strip + 1) * plan.vectors / plan.strips * plan.kernel.lanes);
    plan.kernel.run(a, {batch, head, head_end, first, last - first}, scratch);
    at += head_end - head;
  }
}

}  // namespace

std::span<const Kernel* const> kernels() { return kKernels; }

const Kernel& select_kernel(Isa isa) {
  return **std::find_if(std::begin(kKernels), std::end(kKernels), [&](auto k) { return k->isa == isa; });
}

size_t scratch_bytes(const Kernel& kernel, const Arguments& arguments) {
  const Plan plan = make_plan(kernel, arguments);
  return plan.tasks * plan.scratch_floats * sizeof(float) + kCacheLine;
}

bool run(const Kernel& kernel, const Arguments& arguments, void* scratch, Workers& workers) {
  Plan plan = make_plan(kernel, arguments);
  if (arguments.keys == 0) {
    std::fill_n(arguments.y, arguments.batches * arguments.queries * arguments.heads * arguments.value_size, 0.0f);
    return true;
  }
  const auto address = reinterpret_cast<uintptr_t>(scratch);
  plan.scratch = reinterpret_cast<float*>((address + kCacheLine - 1) / kCacheLine * kCacheLine);
  if (plan.tasks <= 1) {
    if (plan.tasks == 1) task(&plan, 0);
    return true;
  }
  return workers.run(plan.tasks, task, &plan);
}

}  // namespace sparse_ops::attention
