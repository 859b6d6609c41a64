// Choosing a kernel and running it over all tokens and outputs.
#pragma once

#include "kernels/dispatch.h"
#include "kernels/nbits/kernel.h"
#include "kernels/workers.h"

namespace sparse_ops::nbits {

// Every kernel that was compiled, best first.
Table<Kernel> kernels();

// The best kernel that needs none but `features`.
const Kernel& select_kernel(Features features);

// Bytes of memory that run() needs for so many tokens.
size_t scratch_bytes(const Weight& weight, size_t tokens);

// y [tokens, N] of x [tokens, K]; tasks are cut for `threads`. False only if `workers` failed.
bool run(const Kernel& kernel, const Weight& weight, const float* x, size_t tokens, float* y, void* scratch,
         size_t threads, Workers& workers);

}  // namespace sparse_ops::nbits
