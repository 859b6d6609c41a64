// The kernel's body for any vector width. Included by one source file per instruction set.
#pragma once

#include "kernels/spconv/copy_pieces.h"
#include "kernels/spconv/kernel.h"
#include "kernels/spconv/map_product.h"
#include "kernels/spconv/store_channels.h"

namespace sparse_ops::spconv {
namespace {

template <size_t kLanes>
constexpr Kernel make_kernel(const KernelRow& row) {
  return {agreed(row, kLanes), copy_pieces<(kLanes > 8 ? 8 : kLanes)>, store_channels<kLanes>, depthwise<kLanes>};
}

}  // namespace
}  // namespace sparse_ops::spconv
