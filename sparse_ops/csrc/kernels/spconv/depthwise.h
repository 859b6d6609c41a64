// Convolutions whose groups have one input and one output channel each: every map depends on one map only, so
// that no weight would multiply more than one row of a panel. Bands of padded rows take the place of panels.
#pragma once

#include "kernels/spconv/spconv.h"

namespace sparse_ops::spconv {

// Whether run_depthwise() takes the convolution at the sizes of `plan`.
bool fits_depthwise(const Plan& plan, const Convolution& convolution);

// As run() of spconv.h, without scratch memory.
bool run_depthwise(const Plan& plan, const Convolution& convolution, const float* x, const float* residual,
                   float* y, Workers& workers);

}  // namespace sparse_ops::spconv
