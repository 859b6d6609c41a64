// The rows of kernels.inc and their kernels, declared. Each kernel is defined in the source file of its
// features.
#pragma once

#include "kernels/spmm/kernel.h"

namespace sparse_ops::spmm {

namespace row {
#define KERNEL(name, ...) constexpr KernelRow name = {#name, __VA_ARGS__};
#include "kernels/spmm/kernels.inc"
#undef KERNEL
}  // namespace row

#define KERNEL(name, ...) extern const Kernel name;
#include "kernels/spmm/kernels.inc"
#undef KERNEL

}  // namespace sparse_ops::spmm
