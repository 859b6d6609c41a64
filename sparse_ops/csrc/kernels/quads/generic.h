// The kernel's body for any vector width and tile. Included by one source file per instruction set.
#pragma once

#include "kernels/quads/accumulate.h"
#include "kernels/quads/hidden.h"
#include "kernels/quads/kernel.h"
#include "kernels/quads/round.h"
#include "kernels/spmm/generic.h"

namespace sparse_ops::quads {
namespace {

template <size_t kLanes, size_t kVectors, size_t kSets>
constexpr Kernel make_kernel(const KernelRow& row) {
  return {agreed(row, kLanes, kLanes * kVectors),
          round<kLanes, kVectors>,
          pack<kLanes, kVectors>,
          multiply<kLanes, kVectors, kSets>,
          interleave<kLanes>,
          kMiddleBytes,
          multiply_bytes<kLanes, kVectors, kSets>,
          settle<kLanes, kVectors>,
          spmm::activate<kLanes>,
          spmm::store_tokens<kLanes, kLanes * kVectors>,
          find_extremes<kLanes, kVectors>,
          round_rows<kLanes, kVectors>};
}

}  // namespace
}  // namespace sparse_ops::quads
