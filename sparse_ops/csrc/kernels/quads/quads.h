// Choosing kernels and running them over all tokens: Y = act(round(X) . W + bias), X floats or bytes.
#pragma once

#include <cstddef>
#include <span>

#include "kernels/dispatch.h"
#include "kernels/quads/kernel.h"
#include "kernels/spmm/spmm.h"
#include "kernels/workers.h"

namespace sparse_ops::quads {

// Every kernel that was compiled, best first.
Table<Kernel> kernels();

// Whether `kernel` takes weights with that block.
bool fits(const Kernel& kernel, const Weight& weight);

// The best row of a table for a weight and a number of tokens, among those that need the same as the first row
// whose features are all there and that fits: a wide tile, unless a narrow one leaves much fewer columns empty.
// nullptr if there is none.
const Kernel* select(Table<Kernel> table, Features features, const Weight& weight, size_t tokens);

// The best kernel for a weight, which some kernel fits, and a number of tokens.
const Kernel& select_kernel(Features features, const Weight& weight, size_t tokens);

// The narrowest of the kernels that need what `full` does, for fewer tokens than its tile has.
const Kernel& select_last(const Kernel& full, const Weight& weight, size_t tokens);

// Which kernels one call uses. Full tiles come first; the last, partial one may have a smaller kernel.
struct Plan {
  const Kernel* full;
  const Kernel* last;
  size_t tokens;
  size_t strip;          // tokens whose panels are in memory at a time, a multiple of full->tile
  size_t scratch_bytes;  // memory that run() needs, any alignment
  size_t threads;        // that the tasks are cut for; any number may run them
};
Plan make_plan(const Weight& weight, size_t tokens, Features features, size_t threads = 1);
Plan make_plan(const Weight& weight, size_t tokens, const Kernel& kernel, size_t threads = 1);

using spmm::Output;

// `x` [tokens, K], row-major, to outputs, which have the columns of Y in order, each from a block of its own
// on. Together they have all blocks (half of them if the weight is gated). False only if `workers` failed.
bool run(const Plan& plan, const Weight& weight, const float* x, std::span<const Output> outputs,
         void* scratch, Workers& workers);
bool run(const Plan& plan, const Weight& weight, const Bytes& x, std::span<const Output> outputs,
         void* scratch, Workers& workers);

// All of Y as one output.
bool run(const Plan& plan, const Weight& weight, const float* x, float* y, void* scratch, Workers& workers);
bool run(const Plan& plan, const Weight& weight, const Bytes& x, float* y, void* scratch, Workers& workers);

}  // namespace sparse_ops::quads
