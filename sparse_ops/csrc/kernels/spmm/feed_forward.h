// Two linears in a row: Y = act(X . W + bias) . V + bias. The activations between them stay in panels, one
// tile at a time, so that they are neither transposed nor written to memory.
#pragma once

#include "kernels/spmm/spmm.h"

namespace sparse_ops::spmm {

// `first` may have an activation and be gated, `second` may not, and has an input channel for each output of
// `first`.
Plan make_plan(const Weight& first, const Weight& second, size_t tokens, Features features,
               size_t threads = 1);
Plan make_plan(const Weight& first, const Weight& second, size_t tokens, const Kernel& kernel,
               size_t threads = 1);

// `x` [tokens, first.K] to `y` [tokens, second.N], both row-major. False only if `workers` failed.
bool run(const Plan& plan, const Weight& first, const Weight& second, const float* x, float* y, void* scratch,
         Workers& workers);

// Whether `kernel` takes both.
bool fits(const Kernel& kernel, const Weight& first, const Weight& second);

// The best kernel for both and a number of tokens.
const Kernel& select_kernel(Features features, const Weight& first, const Weight& second, size_t tokens);

}  // namespace sparse_ops::spmm
