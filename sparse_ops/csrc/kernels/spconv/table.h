// The rows of kernels.inc and their kernels, declared. Each kernel is defined in the source file of its
// features.
#pragma once

#include "kernels/spconv/kernel.h"

namespace sparse_ops::spconv {

namespace row {
#define KERNEL(name, ...) constexpr KernelRow name = {#name, __VA_ARGS__};
#include "kernels/spconv/kernels.inc"
#undef KERNEL
}  // namespace row

#define KERNEL(name, ...) extern const Kernel name;
#include "kernels/spconv/kernels.inc"
#undef KERNEL

}  // namespace sparse_ops::spconv
