// What is done with the product of an operator SparseMatMul*: the op types that there are with every way to
// store its weight.
#pragma once

#include <cstddef>

#include "kernels/spmm/kernel.h"

namespace sparse_ops {

constexpr size_t kMaxOutputs = 3;

// What the name of an operator says.
struct MatMulVariant {
  const char* name;
  spmm::Activation activation;
  size_t outputs = 1;  // with several, the attribute `split` has the channels of each
  bool gated = false;
};

constexpr MatMulVariant kMatMuls[] = {{"SparseMatMul", spmm::Activation::none},
                                      {"SparseMatMulRelu", spmm::Activation::relu},
                                      {"SparseMatMulGelu", spmm::Activation::gelu},
                                      {"SparseMatMulGeluTanh", spmm::Activation::gelu_tanh},
                                      {"SparseMatMulSilu", spmm::Activation::silu},
                                      {"SparseMatMulQuickGelu", spmm::Activation::quick_gelu},
                                      {"SparseMatMulSplit2", spmm::Activation::none, 2},
                                      {"SparseMatMulSplit3", spmm::Activation::none, kMaxOutputs},
                                      {"SparseMatMulGeluTanhGate", spmm::Activation::gelu_tanh, 1, true},
                                      {"SparseMatMulSiluGate", spmm::Activation::silu, 1, true}};

}  // namespace sparse_ops
