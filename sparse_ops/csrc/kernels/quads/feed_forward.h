// Two linears in a row: Y = round(act(round(X) . W + bias)) . W2 + bias2, tile by tile, so that what is
// between them is neither transposed nor written to memory.
#pragma once

#include "kernels/quads/quads.h"

namespace sparse_ops::quads {

// Whether `kernel` takes both weights.
bool fits(const Kernel& kernel, const Weight& first, const Weight& second);

// The best kernel for both, which some kernel fits, and a number of tokens.
const Kernel& select_kernel(Features features, const Weight& first, const Weight& second, size_t tokens);

Plan make_plan(const Weight& first, const Weight& second, size_t tokens, Features features,
               size_t threads = 1);
Plan make_plan(const Weight& first, const Weight& second, size_t tokens, const Kernel& kernel,
               size_t threads = 1);

// `x` [tokens, first.K] to `y` [tokens, second.N], both row-major; second.K is the number of outputs of the
// first, half of its N if it is gated. False only if `workers` failed.
bool run(const Plan& plan, const Weight& first, const Weight& second, const float* x, float* y, void* scratch,
         Workers& workers);

}  // namespace sparse_ops::quads
