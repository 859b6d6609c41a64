// The operators SparseConvDepthwise*, one op type per activation; contract in
// sparse_ops/ops/sparse_conv_depthwise.py.
#pragma once

#include <vector>

#include "ort_abi.h"

namespace sparse_ops {

// Descriptions of the operators for the runtime that `api` belongs to. They live as long as the library is
// loaded.
std::vector<const OrtCustomOp*> sparse_conv_depthwise_ops(const OrtApi& api);

}  // namespace sparse_ops
