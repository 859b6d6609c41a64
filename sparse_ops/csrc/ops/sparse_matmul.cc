#include "ops/sparse_matmul.h"

#include <array>
#include <map>
#include <mutex>
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

// A description, and behind it what its callbacks need.
struct Op : OrtCustomOp {
  const OrtApi* api;
  const char* name;
  Activation activation;
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
};

Kernel::Kernel(const Op& op, const OrtApi& api, const OrtKernelInfo* info) : api_(api) {
  const NodeReader node(api, info, op.name);
  where_ = node.where();
  isa_ = read_isa(node);
  read_weight(node, op.activation, weight_);
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
  dims.back() = static_cast<int64_t>(weight.N);
  float* y = float_output(api_, context, 0, dims);
  if (x.elements == 0) return;

  const spmm::Plan plan = spmm::make_plan(weight, x.elements / weight.K, isa_);
  const Scratch scratch(api_, context, x.value, plan.scratch_bytes);
  SessionWorkers workers(api_, context);
  if (!spmm::run(plan, weight, x.data, y, scratch.get(), workers)) check_status(workers.status());
}

void infer_shape(const OrtApi& api, OrtShapeInferContext* context) {
  SymbolicShape shape;
  if (!input_shape(api, context, 0, shape)) return;
  shape.dims.back() = integer_attribute(api, context, "N");
  shape.names.back() = "";
  set_output_shape(api, context, 0, shape);
}

Op make_op(const OrtApi& api, const char* name, Activation activation) {
  Op op{cpu_op(), &api, name, activation};
  op.GetName = [](const OrtCustomOp* o) { return self(o).name; };
  op.GetInputType = [](const OrtCustomOp*, size_t i) {
    return i == 0 ? ORT_FLOAT : kWeightInputs[i - 1].type;
  };
  op.GetInputTypeCount = [](const OrtCustomOp*) { return 1 + std::size(kWeightInputs); };
  op.GetOutputType = [](const OrtCustomOp*, size_t) { return ORT_FLOAT; };
  op.GetOutputTypeCount = [](const OrtCustomOp*) { return size_t{1}; };
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
    return guarded(*self(o).api, [&] { infer_shape(*self(o).api, context); });
  };
  return op;
}

}  // namespace

std::vector<const OrtCustomOp*> sparse_matmul_ops(const OrtApi& api) {
  // A process may hold several runtimes. Sessions may outlive any moment at which these could be freed.
  static std::mutex mutex;
  static auto& sets = *new std::map<const OrtApi*, std::array<Op, 5>>;
  const std::lock_guard lock(mutex);
  const auto [place, is_new] = sets.try_emplace(&api);
  if (is_new) {
    place->second = {make_op(api, "SparseMatMul", Activation::none),
                     make_op(api, "SparseMatMulRelu", Activation::relu),
                     make_op(api, "SparseMatMulGelu", Activation::gelu),
                     make_op(api, "SparseMatMulGeluTanh", Activation::gelu_tanh),
                     make_op(api, "SparseMatMulSilu", Activation::silu)};
  }
  std::vector<const OrtCustomOp*> ops;
  for (const Op& op : place->second) ops.push_back(&op);
  return ops;
}

}  // namespace sparse_ops
