// The operators SparseLSTM* and SparseGRU*; contract in sparse_ops/ops/sparse_recurrent.py.
#pragma once

#include <vector>

#include "ort_abi.h"

namespace sparse_ops {

// Descriptions of the operators for the runtime that `api` belongs to. They live as long as the library is
// loaded.
std::vector<const OrtCustomOp*> sparse_recurrent_ops(const OrtApi& api);

}  // namespace sparse_ops
