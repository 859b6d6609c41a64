// The kernels of kernels.inc, declared. Each is defined in the source file of its instruction set.
#pragma once

#include "kernels/normalization/kernel.h"

namespace sparse_ops::normalization {

#define NORMALIZATION_KERNEL(name) extern const Kernel name;
#include "kernels/normalization/kernels.inc"
#undef NORMALIZATION_KERNEL

}  // namespace sparse_ops::normalization
