#include "kernels/recurrent/recurrent.h"

#include <algorithm>
#include <cstring>

#include "kernels/recurrent/table.h"
#include "kernels/sizes.h"
#include "kernels/spmm/tasks.h"

namespace sparse_ops::recurrent {
namespace {

// Stored weights times rows of one step from which on sharing it among workers pays: waiting for all of them
// at its end costs about a microsecond.
constexpr size_t kStepProducts = 1 << 16;

// Where blocks of the weight do not end where gates do, a block may be computed for two slices. So many
// blocks make a slice then, of which two are computed twice at most.
constexpr size_t kUnalignedBlocks = 8;

// Hidden elements are computed in slices of this size, with all their gates.
size_t slice_size(const Problem& problem) {
  const size_t block = problem.weight->block;
  return problem.hidden % block == 0 ? block : kUnalignedBlocks * block;
}

// What one tile of rows in one direction needs, beside what all share.
struct Chain {
  const Plan& plan;
  const Problem& problem;
  size_t direction, first, rows;  // rows first..first+rows-1 of the batch
  const spmm::Kernel& kernel;
  float* panels[2];  // [hidden, tile]: h before and behind a step in turn, or h and r h
  float* products;   // [rows, gates, hidden]
  float* reset;      // [rows, hidden]

  size_t hidden() const { return problem.hidden; }
  size_t slices() const { return divide_up(hidden(), slice_size(problem)); }
  float* state(float* of) const { return of + (direction * problem.batch + first) * hidden(); }
  bool backwards() const { return problem.reverse || direction == 1; }
  size_t length(size_t row) const {
    return problem.lengths ? static_cast<size_t>(problem.lengths[first + row]) : problem.steps;
  }
  size_t steps() const {
    size_t most = 0;
    for (size_t row = 0; row < rows; ++row) most = std::max(most, length(row));
    return most;
  }
  float* output(size_t time, size_t row) const {
    return problem.y + ((time * problem.directions + direction) * problem.batch + first + row) * hidden();
  }
  const float* input(size_t time, size_t row) const {
    const size_t size = gates(problem.cell) * hidden();
    return problem.x + ((time * problem.batch + first + row) * problem.directions + direction) * size;
  }
};

size_t product_size(const Problem& problem, size_t rows) {
  return round_up(rows * (gates(problem.cell) + 1) * problem.hidden, kCacheLine / sizeof(float));
}

size_t chain_size(const Plan& plan, const Problem& problem) {
  return 2 * spmm::panel_size(*plan.full, problem.hidden) + product_size(problem, plan.full->tile);
}

size_t tiles(const Plan& plan, const Problem& problem) { return divide_up(problem.batch, plan.full->tile); }

Chain make_chain(const Plan& plan, const Problem& problem, float* memory, size_t index) {
  const size_t tile = index % tiles(plan, problem), first = tile * plan.full->tile;
  const size_t rows = std::min(plan.full->tile, problem.batch - first);
  const size_t panel = spmm::panel_size(*plan.full, problem.hidden);
  float* own = memory + index * chain_size(plan, problem);
  float* products = own + 2 * panel;
  return {plan,
          problem,
          index / tiles(plan, problem),
          first,
          rows,
          rows < plan.full->tile ? *plan.last : *plan.full,
          {own, own + panel},
          products,
          products + rows * gates(problem.cell) * problem.hidden};
}

// Columns begin..end-1 of h, or of r h, into a panel.
void fill_panel(const Chain& chain, const float* rows, size_t begin, size_t end, float* panel) {
  chain.kernel.transpose(rows, chain.rows, chain.hidden(), begin, end, panel);
}

void start(const Chain& chain) {
  fill_panel(chain, chain.state(chain.problem.h), 0, chain.hidden(), chain.panels[0]);
}

// Elements begin..end-1 of the products of one gate.
void multiply(const Chain& chain, const float* panel, size_t gate, size_t begin, size_t end) {
  alignas(kCacheLine) float acc[spmm::kMaxAccumulators];
  const spmm::Weight& weight = *chain.problem.weight;
  const size_t count = gates(chain.problem.cell), row_size = count * chain.hidden();
  const size_t first = (chain.direction * count + gate) * chain.hidden();  // column of the weight
  float* products = chain.products + gate * chain.hidden();
  for (size_t block = (first + begin) / weight.block; block * weight.block < first + end; ++block) {
    chain.kernel.multiply(weight, block, panel, acc);
    const size_t from = std::max(block * weight.block, first + begin);
    const size_t to = std::min((block + 1) * weight.block, first + end);
    chain.kernel.store_tokens(acc + (from - block * weight.block) * chain.kernel.tile, to - from, chain.rows,
                              row_size, products + (from - first));
  }
}

// `act` on elements begin..end-1 of every row that has this step; `output` is where Y has the row, or
// nullptr.
void apply_gates(const Chain& chain, Gates act, size_t step, size_t begin, size_t end, bool is_last) {
  const size_t hidden = chain.hidden();
  for (size_t row = 0; row < chain.rows; ++row) {
    const size_t length = chain.length(row);
    if (step >= length) continue;
    const size_t time = chain.backwards() ? length - 1 - step : step;
    float* h = chain.state(chain.problem.h) + row * hidden;
    float* c = chain.problem.c ? chain.state(chain.problem.c) + row * hidden : nullptr;
    act({chain.input(time, row), chain.products + row * gates(chain.problem.cell) * hidden, hidden, h, c,
         chain.reset + row * hidden},
        begin, end);
    if (is_last) std::memcpy(chain.output(time, row) + begin, h + begin, (end - begin) * sizeof(float));
  }
}

// A step has one stage, or two where a product needs a gate.
size_t stages(Cell cell) { return cell == Cell::gru_reset_first ? 2 : 1; }

// One slice of one stage of a step. Slices do not depend on each other; they depend on all of the stage
// before.
void run_slice(const Chain& chain, size_t step, size_t stage, size_t slice) {
  const Kernel& kernel = *chain.plan.gates;
  const Problem& problem = chain.problem;
  const size_t size = slice_size(problem);
  const size_t begin = slice * size, end = std::min(begin + size, chain.hidden());
  if (problem.cell != Cell::gru_reset_first) {
    const float* before = chain.panels[step % 2];
    for (size_t gate = 0; gate < gates(problem.cell); ++gate) multiply(chain, before, gate, begin, end);
    apply_gates(chain, problem.cell == Cell::lstm ? kernel.lstm : kernel.gru, step, begin, end, true);
    fill_panel(chain, chain.state(problem.h), begin, end, chain.panels[(step + 1) % 2]);
  } else if (stage == 0) {
    for (size_t gate = 0; gate < 2; ++gate) multiply(chain, chain.panels[0], gate, begin, end);
    apply_gates(chain, kernel.gru_reset, step, begin, end, false);
    fill_panel(chain, chain.reset, begin, end, chain.panels[1]);
  } else {
    multiply(chain, chain.panels[1], 2, begin, end);
    apply_gates(chain, kernel.gru_update, step, begin, end, true);
    fill_panel(chain, chain.state(problem.h), begin, end, chain.panels[0]);
  }
}

// Zeros behind the end of each row, and in the state of rows without steps.
void finish(const Chain& chain) {
  const size_t bytes = chain.hidden() * sizeof(float);
  for (size_t row = 0; row < chain.rows; ++row) {
    const size_t length = chain.length(row);
    for (size_t time = length; time < chain.problem.steps; ++time)
      std::memset(chain.output(time, row), 0, bytes);
    if (length > 0) continue;
    std::memset(chain.state(chain.problem.h) + row * chain.hidden(), 0, bytes);
    if (chain.problem.c) std::memset(chain.state(chain.problem.c) + row * chain.hidden(), 0, bytes);
  }
}

struct Tasks {
  const Plan& plan;
  const Problem& problem;
  float* memory;
  size_t step, stage;

  Chain chain(size_t index) const { return make_chain(plan, problem, memory, index); }
};

void chain_task(void* context, size_t index) {
  const Chain chain = static_cast<const Tasks*>(context)->chain(index);
  start(chain);
  for (size_t step = 0; step < chain.steps(); ++step) {
    for (size_t stage = 0; stage < stages(chain.problem.cell); ++stage) {
      for (size_t slice = 0; slice < chain.slices(); ++slice) run_slice(chain, step, stage, slice);
    }
  }
  finish(chain);
}

void slice_task(void* context, size_t index) {
  const Tasks& tasks = *static_cast<const Tasks*>(context);
  const size_t slices = divide_up(tasks.problem.hidden, slice_size(tasks.problem));
  const Chain chain = tasks.chain(index / slices);
  if (tasks.step < chain.steps()) run_slice(chain, tasks.step, tasks.stage, index % slices);
}

}  // namespace

Table<Kernel> kernels() { return kKernels; }

const Kernel& select_kernel(Features features) { return select_permitted<Kernel>(kKernels, features); }

namespace {

Plan make_plan(const Problem& problem, const Kernel& gates, const spmm::Kernel& full,
               const spmm::Kernel& last) {
  Plan plan{&gates, &full, &last, false, 0};
  const size_t chains = problem.directions * tiles(plan, problem);
  plan.scratch_bytes = chains * chain_size(plan, problem) * sizeof(float) + kCacheLine;
  return plan;
}

}  // namespace

Plan make_plan(const Problem& problem, Features features, size_t threads) {
  const spmm::Weight& weight = *problem.weight;
  const spmm::Kernel& full = spmm::select_kernel(features, weight, problem.batch);
  const spmm::Kernel& last = spmm::select_last(full, features, weight, problem.batch % full.tile);
  Plan plan = make_plan(problem, select_kernel(features), full, last);
  plan.steps_are_split = problem.directions * tiles(plan, problem) < threads &&
                         weight.entries * weight.width * problem.batch >= kStepProducts;
  return plan;
}

Plan make_plan(const Problem& problem, const Kernel& gates, const spmm::Kernel& kernel,
               bool steps_are_split) {
  Plan plan = make_plan(problem, gates, kernel, kernel);
  plan.steps_are_split = steps_are_split;
  return plan;
}

bool run(const Plan& plan, const Problem& problem, void* scratch, Workers& workers) {
  float* memory = reinterpret_cast<float*>(round_up(reinterpret_cast<uintptr_t>(scratch), kCacheLine));
  const size_t chains = problem.directions * tiles(plan, problem);
  Tasks tasks{plan, problem, memory, 0, 0};
  if (!plan.steps_are_split) return workers.run(chains, chain_task, &tasks);
  const size_t slices = divide_up(problem.hidden, slice_size(problem));
  for (size_t i = 0; i < chains; ++i) start(tasks.chain(i));
  for (; tasks.step < problem.steps; ++tasks.step) {
    for (tasks.stage = 0; tasks.stage < stages(problem.cell); ++tasks.stage) {
      if (!workers.run(chains * slices, slice_task, &tasks)) return false;
    }
  }
  for (size_t i = 0; i < chains; ++i) finish(tasks.chain(i));
  return true;
}

}  // namespace sparse_ops::recurrent
