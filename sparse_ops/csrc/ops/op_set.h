// What a family of operators is to the runtime, made from the class of its kernels.
#pragma once

#include <iterator>
#include <map>
#include <mutex>
#include <vector>

#include "ops/op_support.h"

namespace sparse_ops {

// Descriptions of the operators whose nodes `Kernel` runs, one for each element of `Kernel::kVariants`, for
// the runtime that `api` belongs to. They live as long as the library is loaded. A variant has a `name`;
// `Kernel` has, beside a constructor from (variant, node) and compute(context),
//
//   static OrtElementType input_type(const Variant&, size_t index);
//   static OrtElementType output_type(const Variant&);                      or none: all outputs are float32
//   static size_t input_count(const Variant&);
//   static size_t output_count(const Variant&);
//   static void infer_shape(const OrtApi&, const Variant&, OrtShapeInferContext*);
template <class Kernel>
std::vector<const OrtCustomOp*> make_ops(const OrtApi& api) {
  using Variant = typename Kernel::Variant;
  struct Op : OrtCustomOp {
    const OrtApi* api;
    const Variant* variant;
    static const Op& self(const OrtCustomOp* op) { return *static_cast<const Op*>(op); }
  };
  struct Instance {
    const OrtApi& api;
    Kernel kernel;
  };
  const auto make = [&api](const Variant& variant) {
    Op op{cpu_op(), &api, &variant};
    op.GetName = [](const OrtCustomOp* o) { return Op::self(o).variant->name; };
    op.GetInputType = [](const OrtCustomOp* o, size_t index) {
      return Kernel::input_type(*Op::self(o).variant, index);
    };
    op.GetInputTypeCount = [](const OrtCustomOp* o) { return Kernel::input_count(*Op::self(o).variant); };
    op.GetOutputType = [](const OrtCustomOp* o, size_t) {
      if constexpr (requires { Kernel::output_type(*Op::self(o).variant); }) {
        return Kernel::output_type(*Op::self(o).variant);
      } else {
        return ORT_FLOAT;
      }
    };
    op.GetOutputTypeCount = [](const OrtCustomOp* o) { return Kernel::output_count(*Op::self(o).variant); };
    op.CreateKernelV2 = [](const OrtCustomOp* o, const OrtApi* runtime, const OrtKernelInfo* info,
                           void** kernel) {
      return guarded(*runtime, [&] {
        const Variant& own = *Op::self(o).variant;
        *kernel = new Instance{*runtime, Kernel(own, NodeReader(*runtime, info, own.name))};
      });
    };
    op.KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      const Instance& instance = *static_cast<Instance*>(kernel);
      return guarded(instance.api, [&] { instance.kernel.compute(context); });
    };
    op.KernelDestroy = [](void* kernel) { delete static_cast<Instance*>(kernel); };
    op.InferOutputShapeFn = [](const OrtCustomOp* o, OrtShapeInferContext* context) {
      const Op& self = Op::self(o);
      return guarded(*self.api, [&] { Kernel::infer_shape(*self.api, *self.variant, context); });
    };
    return op;
  };
  // A process may hold several runtimes. Sessions may outlive any moment at which these could be freed.
  static std::mutex mutex;
  static auto& sets = *new std::map<const OrtApi*, std::vector<Op>>;
  const std::lock_guard lock(mutex);
  std::vector<Op>& set = sets[&api];
  if (set.empty()) {
    for (const Variant& variant : Kernel::kVariants) set.push_back(make(variant));
  }
  std::vector<const OrtCustomOp*> ops;
  for (const Op& op : set) ops.push_back(&op);
  return ops;
}

}  // namespace sparse_ops
