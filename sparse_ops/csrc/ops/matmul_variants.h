// What is done with the product of an operator SparseMatMul*: the op types that there are with every way to
// store its weight.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "formats/linears.h"
#include "kernels/spmm/kernel.h"
#include "ops/op_support.h"

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

// Channels of each output of a node whose weight has N outputs in blocks. What it says of several linears is
// checked: all but the last have whole blocks.
inline std::vector<int64_t> read_outputs(const NodeReader& node, const MatMulVariant& product, size_t N,
                                         size_t block) {
  const auto all = static_cast<int64_t>(N);
  std::vector<int64_t> linears = {all};
  std::string sizes = "N is " + std::to_string(N);
  if (product.outputs > 1) {
    linears = node.integers("split", product.outputs);
    sizes = "split is " + text_of(linears);
  } else if (product.gated) {
    linears = {all / 2, all / 2};
  }
  const std::string expected = check_whole_blocks(N, block, linears);
  if (!expected.empty()) node.fail("attribute " + sizes + ", expected " + expected);
  if (product.gated) linears.pop_back();
  return linears;
}

}  // namespace sparse_ops
