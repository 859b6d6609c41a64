#include "ops/sparse_matmul.h"

#include <array>
#include <map>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "cpu_features.h"
#include "kernels/spmm/check.h"
#include "kernels/spmm/spmm.h"
#include "ops/op_support.h"
#include "ops/stored_weight.h"

namespace sparse_ops {
namespace {

using spmm::Activation;

constexpr size_t kMaxOutputs = 3;

struct Variant {
  const char* name;
  Activation activation;
  size_t outputs = 1;  // with several, the attribute `split` has the channels of each
  bool gated = false;
};
constexpr Variant kVariants[] = {{"SparseMatMul", Activation::none},
                                 {"SparseMatMulRelu", Activation::relu},
                                 {"SparseMatMulGelu", Activation::gelu},
                                 {"SparseMatMulGeluTanh", Activation::gelu_tanh},
                                 {"SparseMatMulSilu", Activation::silu},
                                 {"SparseMatMulSplit2", Activation::none, 2},
                                 {"SparseMatMulSplit3", Activation::none, kMaxOutputs},
                                 {"SparseMatMulGeluTanhGate", Activation::gelu_tanh, 1, true},
                                 {"SparseMatMulSiluGate", Activation::silu, 1, true}};

// A description, and behind it what its callbacks need.
struct Op : OrtCustomOp {
  const OrtApi* api;
  Variant variant;
};

const Op& self(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }

class Kernel {
 public:
  Kernel(const Op& op, const OrtApi& api, const OrtKernelInfo* info);
  const OrtApi& api() const { return api_; }
  void compute(OrtKernelContext* context) const;

 private:
  const OrtApi& api_;
  std::string where_;
  Isa isa_;
  spmm::CheckedWeight weight_;
  std::vector<int64_t> split_;  // channels of each output
};

// The channels of each output of a weight; every one but the last has whole blocks.
std::vector<int64_t> read_split(const NodeReader& node, const Variant& variant, const spmm::Weight& weight) {
  const auto N = static_cast<int64_t>(weight.N), block = static_cast<int64_t>(weight.block);
  if (variant.gated) {
    if (N % (2 * block) != 0) {
      node.fail("attribute N is " + std::to_string(N) + ", expected two halves of whole blocks of " +
                std::to_string(block));
    }
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

Kernel::Kernel(const Op& op, const OrtApi& api, const OrtKernelInfo* info) : api_(api) {
  const NodeReader node(api, info, op.variant.name);
  where_ = node.where();
  isa_ = read_isa(node);
  read_weight(node, op.variant.activation, weight_);
  weight_.weight.gated = op.variant.gated;
  split_ = read_split(node, op.variant, weight_.weight);
  node.log(std::string("kernel ") + spmm::select_kernel(isa_, weight_.weight, SIZE_MAX).name);
}

void Kernel::compute(OrtKernelContext* context) const {
  const spmm::Weight& weight = weight_.weight;
  const InputTensor x = float_input(api_, context, 0);
  if (x.dims.empty() || x.dims.back() != static_cast<int64_t>(weight.K)) {
    throw InvalidError{where_ + ": input X has shape " + text_of(x.dims) + ", expected [..., " +
                       std::to_string(weight.K) + "]"};
  }
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

void infer_shape(const OrtApi& api, const Variant& variant, OrtShapeInferContext* context) {
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

Op make_op(const OrtApi& api, const Variant& variant) {
  Op op{cpu_op(), &api, variant};
  op.GetName = [](const OrtCustomOp* o) { return self(o).variant.name; };
  op.GetInputType = [](const OrtCustomOp*, size_t i) {
    return i == 0 ? ORT_FLOAT : kWeightInputs[i - 1].type;
  };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return 1 + std::size(kWeightInputs); };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return ORT_FLOAT; };
  op.GetOutputTypeCount = [](const OrtCustomOp* o) { return self(o).variant.outputs; };
  op.CreateKernelV2 = [](const OrtCustomOp* o, const OrtApi* runtime, const OrtKernelInfo* info,
                         void** kernel) {
    return guarded(*runtime, [&] { *kernel = new Kernel(self(o), *runtime, info); });
  };
  op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
    const Kernel& k = *static_cast<Kernel*>(kernel);
    return guarded(k.api(), [&] { k.compute(context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.InferOutputShapeFn = [](const OrtCustomOp* o, OrtShapeInferContext* context) {
    return guarded(*self(o).api, [&] { infer_shape(*self(o).api, self(o).variant, context); });
  };
  return op;
}

}  // namespace

std::vector<const OrtCustomOp*> sparse_matmul_ops(const OrtApi& api) {
  // A process may hold several runtimes. Sessions may outlive any moment at which these could be freed.
  static std::mutex mutex;
  static auto& sets = *new std::map<const OrtApi*, std::array<Op, std::size(kVariants)>>;
  const std::lock_guard lock(mutex);
  const auto [place, is_new] = sets.try_emplace(&api);
  if (is_new) {
    for (size_t i = 0; i < std::size(kVariants); ++i) place->second[i] = make_op(api, kVariants[i]);
  }
  std::vector<const OrtCustomOp*> ops;
  for (const Op& op : place->second) ops.push_back(&op);
  return ops;
}

}  // namespace sparse_ops
