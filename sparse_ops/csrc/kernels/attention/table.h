// The kernels of kernels.inc, declared. Each is defined in the source file of its instruction set.
#pragma once

#include "kernels/attention/kernel.h"

namespace sparse_ops::attention {

#define ATTENTION_KERNEL(name) extern const Kernel name;
#include "kernels/attention/kernels.inc"
#undef ATTENTION_KERNEL

}  // namespace sparse_ops::attention
