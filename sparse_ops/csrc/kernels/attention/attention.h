// Choosing a kernel and running it over all batches, heads and queries.
#pragma once

#include "kernels/attention/kernel.h"
#include "kernels/dispatch.h"
#include "kernels/workers.h"

namespace sparse_ops::attention {

// Every kernel that was compiled, best first.
Table<Kernel> kernels();

// The best kernel that needs none but `features`.
const Kernel& select_kernel(Features features);

// Memory that run() needs, any alignment: a bounded number of tiles, which do not depend on the number of
// keys, and up to 4 MiB for a mask that all heads share.
size_t scratch_bytes(const Kernel& kernel, const Arguments& arguments);

// False only if `workers` failed. Little work is not spread over workers.
bool run(const Kernel& kernel, const Arguments& arguments, void* scratch, Workers& workers);

}  // namespace sparse_ops::attention
