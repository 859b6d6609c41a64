// The kernels of kernels.inc, declared. Each is defined in the source file of its instruction set.
#pragma once

#include "kernels/spmm/kernel.h"

namespace sparse_ops::spmm {

#define SPMM_KERNEL(name) extern const Kernel name;
#include "kernels/spmm/kernels.inc"
#undef SPMM_KERNEL

}  // namespace sparse_ops::spmm
