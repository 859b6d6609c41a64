// The operators SkipLayerNormalization* and SkipRMSNormalization*; contract in sparse_ops/ops/skip_layer_norm.py.
#pragma once

#include <vector>

#include "ort_abi.h"

namespace sparse_ops {

// Descriptions of the operators for the runtime that `api` belongs to. They live as long as the library is
// loaded.
std::vector<const OrtCustomOp*> skip_layer_norm_ops(const OrtApi& api);

}  // namespace sparse_ops
