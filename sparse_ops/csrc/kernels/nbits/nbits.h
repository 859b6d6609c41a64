// Choosing a kernel and running it over all tokens and outputs.
#pragma once

#include <cstddef>
#include <span>

#include "kernels/dispatch.h"
#include "kernels/nbits/kernel.h"
#include "kernels/spmm/spmm.h"
#include "kernels/workers.h"

namespace sparse_ops::nbits {

// Every kernel that was compiled, best first.
Table<Kernel> kernels();

// The best kernel that needs none but `features`.
const Kernel& select_kernel(Features features);

// Bytes of memory that run() needs for so many tokens.
size_t scratch_bytes(const Weight& weight, size_t tokens);

using spmm::Output;

// x [tokens, K] to outputs, which have the columns of Y in order, each from a block of its own on. Together
// they have all blocks (half of them if the weight is gated). Tasks are cut for `threads`. False only if
// `workers` failed.
bool run(const Kernel& kernel, const Weight& weight, const float* x, size_t tokens,
         std::span<const Output> outputs, void* scratch, size_t threads, Workers& workers);

}  // namespace sparse_ops::nbits
