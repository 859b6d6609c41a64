// The kernels of kernels.inc, declared. Each is defined in the source file of its instruction set.
#pragma once

#include "kernels/recurrent/kernel.h"

namespace sparse_ops::recurrent {

#define RECURRENT_KERNEL(name) extern const Kernel name;
#include "kernels/recurrent/kernels.inc"
#undef RECURRENT_KERNEL

}  // namespace sparse_ops::recurrent
