// The operators SparseMatMul*, one op type per activation and per form of output; contracts in
// sparse_ops/ops/sparse_matmul.py and sparse_ops/ops/sparse_matmul_split.py.

#include "ops/operators.h"

#include <span>
#include <vector>

#include "kernels/spmm/spmm.h"
#include "ops/matmul_variants.h"
#include "ops/op_set.h"
#include "ops/op_support.h"
#include "ops/weighted_kernel.h"

namespace sparse_ops {
namespace {

class Kernel : public WeightedKernel<> {
 public:
  using Variant = MatMulVariant;
  static constexpr const auto& kVariants = kMatMuls;
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
    split_ = node.integers("split", variant.outputs);
    read_split_weight(node, variant.activation, "split is " + text_of(split_), split_);
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
  infer_product_shapes(api, context, variant.outputs, variant.gated);
}

}  // namespace

std::vector<const OrtCustomOp*> sparse_matmul_ops(const OrtApi& api) { return make_ops<Kernel>(api); }

}  // namespace sparse_ops
