// The operators SparseMatMul*, one op type per activation; contract in sparse_ops/sparse_matmul.py.
#pragma once

#include <span>

#include "ort_abi.h"

namespace sparse_ops {

constexpr const char* kDomain = "sparse_onnx";

// Descriptions for OrtCustomOpDomain, alive as long as the library is loaded.
std::span<const OrtCustomOp* const> sparse_matmul_ops();

}  // namespace sparse_ops
