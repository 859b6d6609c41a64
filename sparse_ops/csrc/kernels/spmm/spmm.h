// Choosing kernels and running them over all tokens: Y = act(X . W + bias).
#pragma once

#include <cstddef>
#include <span>

#include "kernels/dispatch.h"
#include "kernels/spmm/kernel.h"
#include "kernels/workers.h"

namespace sparse_ops::spmm {

// Every kernel that was compiled, best first.
Table<Kernel> kernels();

// The kernel of that name, or nullptr.
const Kernel* find_kernel(const char* name);

// Whether `kernel` takes weights with that chunk and block.
bool fits(const Kernel& kernel, const Weight& weight);

// The best row of a table for a weight and a number of tokens; nullptr if none that needs no more than
// `features` takes the weight. All rows of one instruction set are looked at, that of the first which is
// there and fits.
const Kernel* select(Table<Kernel> table, Features features, const Weight& weight, size_t tokens);

// The best kernel for a weight, which some kernel fits, and a number of tokens.
const Kernel& select_kernel(Features features, const Weight& weight, size_t tokens);

// The kernel for fewer tokens than a tile of `full` has, behind its full tiles.
const Kernel& select_last(const Kernel& full, Features features, const Weight& weight, size_t tokens);

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

// Part of Y: `channels` of its columns as a matrix of their own, `y` [tokens, channels], row-major.
struct Output {
  float* y;
  size_t channels;
};

// Where a block of so many columns of Y begins.
struct Place {
  const Output& output;
  size_t channel;
};
inline Place place_of(std::span<const Output> outputs, size_t block, size_t size) {
  const Output* output = outputs.data();
  const auto blocks = [&] { return (output->channels - 1) / size + 1; };
  for (; block >= blocks(); ++output) block -= blocks();
  return {*output, block * size};
}

// `x` [tokens, K], row-major, to outputs, which have the columns of Y = act(X . W + bias) in order, each from
// a block of its own on. Together they have all blocks (half of them if the weight is gated). False only if
// `workers` failed.
bool run(const Plan& plan, const Weight& weight, const float* x, std::span<const Output> outputs,
         void* scratch, Workers& workers);

// All of Y as one output; a gated weight has two halves of whole blocks.
bool run(const Plan& plan, const Weight& weight, const float* x, float* y, void* scratch, Workers& workers);

}  // namespace sparse_ops::spmm
