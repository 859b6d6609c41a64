// The operators SparseMatMul*, one op type per activation and per form of output; contracts in
// sparse_ops/ops/sparse_matmul.py and sparse_ops/ops/sparse_matmul_split.py.
#pragma once

#include <vector>

#include "ort_abi.h"

namespace sparse_ops {

// Descriptions of the operators for the runtime that `api` belongs to. They live as long as the library is
// loaded.
std::vector<const OrtCustomOp*> sparse_matmul_ops(const OrtApi& api);

}  // namespace sparse_ops
