// The operators SparseMatMul*, one op type per activation and per form of output; contracts in
// sparse_ops/ops/sparse_matmul.py and sparse_ops/ops/sparse_matmul_split.py.

#include "ops/operators.h"

#include <span>
#include <string>
#include <vector>

#include "kernels/spmm/spmm.h"
#include "ops/op_set.h"
#include "ops/op_support.h"
#include "ops/weighted_kernel.h"

namespace sparse_ops {
namespace {

using spmm::Activation;

constexpr size_t kMaxOutputs = 3;

// What the name of an operator says.
struct MatMulVariant {
  const char* name;
  Activation activation;
  size_t outputs = 1;  // with several, the attribute `split` has the channels of each
  bool gated = false;
};

class Kernel : public WeightedKernel<> {
 public:
  using Variant = MatMulVariant;
  static constexpr Variant kVariants[] = {{"SparseMatMul", Activation::none},
                                          {"SparseMatMulRelu", Activation::relu},
                                          {"SparseMatMulGelu", Activation::gelu},
                                          {"SparseMatMulGeluTanh", Activation::gelu_tanh},
                                          {"SparseMatMulSilu", Activation::silu},
                                          {"SparseMatMulQuickGelu", Activation::quick_gelu},
                                          {"SparseMatMulSplit2", Activation::none, 2},
                                          {"SparseMatMulSplit3", Activation::none, kMaxOutputs},
                                          {"SparseMatMulGeluTanhGate", Activation::gelu_tanh, 1, true},
                                          {"SparseMatMulSiluGate", Activation::silu, 1, true}};
  static size_t output_count(const Variant& variant) { return variant.outputs; }
  static void infer_shape(const OrtApi& api, const Variant& variant, OrtShapeInferContext* context);

  Kernel(const Variant& variant, const NodeReader& node);
  void compute(OrtKernelContext* context) const;

 private:
  std::vector<int64_t> split_;  // channels of each output
};

Kernel::Kernel(const Variant& variant, const NodeReader& node) : WeightedKernel(node) {
  if (variant.outputs == 1) {
    split_ = {read_activated_weight(node, variant.activation, variant.gated)};
  } else {
    split_ = node.integers("split");
    const std::string name = "split is " + text_of(split_);
    if (split_.size() != variant.outputs) {
      node.fail("attribute " + name + ", expected " + std::to_string(variant.outputs) + " sizes");
    }
    read_split_weight(node, variant.activation, name, split_);
  }
  node.log("kernel " + kernel_name());
}

void Kernel::compute(OrtKernelContext* context) const {
  const InputTensor x = rows_input(context);
  std::vector<int64_t> dims = x.dims;
  spmm::Output outputs[kMaxOutputs];
  for (size_t i = 0; i < split_.size(); ++i) {
    dims.back() = split_[i];
    outputs[i] = {float_output(api_, context, i, dims), static_cast<size_t>(split_[i])};
  }
  if (x.elements == 0) return;

  const spmm::Plan plan = spmm::make_plan(weight(), x.elements / weight().K, features_, threads());
  const std::span<const spmm::Output> used(outputs, split_.size());
  run_planned(context, x, plan.scratch_bytes, [&](void* scratch, Workers& workers) {
    return spmm::run(plan, weight(), x.data, used, scratch, workers);
  });
}

void Kernel::infer_shape(const OrtApi& api, const Variant& variant, OrtShapeInferContext* context) {
  SymbolicShape shape;
  if (!input_shape(api, context, 0, shape)) return;
  shape.names.back() = "";
  std::vector<int64_t> split;
  if (variant.outputs == 1) {
    split = {integer_attribute(api, context, "N") / (variant.gated ? 2 : 1)};
  } else {
    split = integers_attribute(api, context, "split");
    if (split.size() != variant.outputs) return;  // refused when the kernel is created
  }
  for (size_t i = 0; i < variant.outputs; ++i) {
    shape.dims.back() = split[i];
    set_output_shape(api, context, i, shape);
  }
}

}  // namespace

std::vector<const OrtCustomOp*> sparse_matmul_ops(const OrtApi& api) { return make_ops<Kernel>(api); }

}  // namespace sparse_ops
