#include "ops/sparse_matmul.h"

#include <span>
#include <string>
#include <vector>

#include "kernels/spmm/check.h"
#include "kernels/spmm/spmm.h"
#include "ops/op_set.h"
#include "ops/op_support.h"
#include "ops/stored_weight.h"

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

class Kernel {
 public:
  using Variant = MatMulVariant;
  static constexpr Variant kVariants[] = {{"SparseMatMul", Activation::none},
                                          {"SparseMatMulRelu", Activation::relu},
                                          {"SparseMatMulGelu", Activation::gelu},
                                          {"SparseMatMulGeluTanh", Activation::gelu_tanh},
                                          {"SparseMatMulSilu", Activation::silu},
                                          {"SparseMatMulSplit2", Activation::none, 2},
                                          {"SparseMatMulSplit3", Activation::none, kMaxOutputs},
                                          {"SparseMatMulGeluTanhGate", Activation::gelu_tanh, 1, true},
                                          {"SparseMatMulSiluGate", Activation::silu, 1, true}};
  static OrtElementType input_type(const Variant&, size_t i) {
    return i == 0 ? ORT_FLOAT : kWeightInputs[i - 1].type;
  }
  static size_t input_count(const Variant&) { return 1 + std::size(kWeightInputs); }
  static size_t output_count(const Variant& variant) { return variant.outputs; }
  static void infer_shape(const OrtApi& api, const Variant& variant, OrtShapeInferContext* context);

  Kernel(const Variant& variant, const OrtApi& api, const OrtKernelInfo* info);
  void compute(OrtKernelContext* context) const;

 private:
  const OrtApi& api_;
  std::string where_;
  Isa isa_;
  spmm::CheckedWeight weight_;
  std::vector<int64_t> split_;  // channels of each output
};

// The channels of each output of a weight; every one but the last has whole blocks.
std::vector<int64_t> read_split(const NodeReader& node, const MatMulVariant& variant,
                                const spmm::Weight& weight) {
  const auto N = static_cast<int64_t>(weight.N), block = static_cast<int64_t>(weight.block);
  if (variant.gated) {
    check_gate(node, weight);
    return {N / 2};
  }
  if (variant.outputs == 1) return {N};
  const std::vector<int64_t> split = node.integers("split");
  bool good = split.size() == variant.outputs;
  int64_t left = N;
  for (size_t i = 0; i < split.size() && good; ++i) {
    good = split[i] >= 1 && split[i] <= left && (split[i] == left || split[i] % block == 0);
    left -= split[i];
  }
  if (!good || left != 0) {
    node.fail("attribute split is " + text_of(split) + ", expected " + std::to_string(variant.outputs) +
              " sizes that add up to N = " + std::to_string(N) + ", all but the last multiples of block " +
              std::to_string(block));
  }
  return split;
}

Kernel::Kernel(const Variant& variant, const OrtApi& api, const OrtKernelInfo* info) : api_(api) {
  const NodeReader node(api, info, variant.name);
  where_ = node.where();
  isa_ = node.isa();
  read_weight(node, variant.activation, weight_);
  weight_.weight.gated = variant.gated;
  split_ = read_split(node, variant, weight_.weight);
  node.log(std::string("kernel ") + spmm::select_kernel(isa_, weight_.weight, SIZE_MAX).name);
}

void Kernel::compute(OrtKernelContext* context) const {
  const spmm::Weight& weight = weight_.weight;
  const InputTensor x = rows_input(api_, context, where_, weight.K);
  std::vector<int64_t> dims = x.dims;
  spmm::Output outputs[kMaxOutputs];
  for (size_t i = 0; i < split_.size(); ++i) {
    dims.back() = split_[i];
    outputs[i] = {float_output(api_, context, i, dims), static_cast<size_t>(split_[i])};
  }
  if (x.elements == 0) return;

  const spmm::Plan plan = spmm::make_plan(weight, x.elements / weight.K, isa_);
  const Scratch scratch(api_, context, x.value, plan.scratch_bytes);
  SessionWorkers workers(api_, context);
  const std::span<const spmm::Output> used(outputs, split_.size());
  if (!spmm::run(plan, weight, x.data, used, scratch.get(), workers)) check_status(workers.status());
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
