// The operators Attention, AttentionSplit and AttentionHeads, each without a mask, with one, and with one where
// weights that are NaN become 0; contract in sparse_ops/attention.py.
#pragma once

#include <vector>

#include "ort_abi.h"

namespace sparse_ops {

// Descriptions of the operators for the runtime that `api` belongs to. They live as long as the library is
// loaded.
std::vector<const OrtCustomOp*> attention_ops(const OrtApi& api);

}  // namespace sparse_ops
