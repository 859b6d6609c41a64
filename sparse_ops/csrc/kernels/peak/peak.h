// What this processor could reach at most, in one thread: the limits that kernels are compared with.
#pragma once

#include "kernels/dispatch.h"
#include "kernels/peak/kernel.h"

namespace sparse_ops::peak {

// Every kernel that was compiled, best first.
Table<Kernel> kernels();

// The best kernel that needs none but `features`.
const Kernel& select_kernel(Features features);

// Operations per second of one limit, Kernel::in_registers or Kernel::with_loads: the best of short runs
// during about `seconds`.
double measure(double (*limit)(size_t steps), double seconds);

}  // namespace sparse_ops::peak
