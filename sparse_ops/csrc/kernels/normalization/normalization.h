// Choosing a kernel and running it over all rows: layer and RMS normalization, with or without x + skip.
#pragma once

#include "kernels/dispatch.h"
#include "kernels/normalization/kernel.h"
#include "kernels/workers.h"

namespace sparse_ops::normalization {

// Every kernel that was compiled, best first.
Table<Kernel> kernels();

// The best kernel that needs none but `features`.
const Kernel& select_kernel(Features features);

// False only if `workers` failed. Little work is not spread over workers.
bool run(const Kernel& kernel, const Arguments& arguments, Workers& workers);

}  // namespace sparse_ops::normalization
