// The operators SparseFeedForward*, one op type per activation; contract in
// sparse_ops/ops/sparse_feed_forward.py.

#include "ops/operators.h"

#include <string>

#include "kernels/spmm/feed_forward.h"
#include "ops/op_set.h"
#include "ops/op_support.h"
#include "ops/weighted_kernel.h"

namespace sparse_ops {
namespace {

using spmm::Activation;

// What the name of an operator says.
struct FeedForwardVariant {
  const char* name;
  Activation activation;
  bool gated = false;
};

class Kernel : public WeightedKernel<2> {
 public:
  using Variant = FeedForwardVariant;
  static constexpr Variant kVariants[] = {{"SparseFeedForward", Activation::none},
                                          {"SparseFeedForwardRelu", Activation::relu},
                                          {"SparseFeedForwardGelu", Activation::gelu},
                                          {"SparseFeedForwardGeluTanh", Activation::gelu_tanh},
                                          {"SparseFeedForwardSilu", Activation::silu},
                                          {"SparseFeedForwardQuickGelu", Activation::quick_gelu},
                                          {"SparseFeedForwardGeluTanhGate", Activation::gelu_tanh, true},
                                          {"SparseFeedForwardSiluGate", Activation::silu, true}};
  static void infer_shape(const OrtApi& api, const Variant&, OrtShapeInferContext* context);

  Kernel(const Variant& variant, const NodeReader& node);
  void compute(OrtKernelContext* context) const;
};

Kernel::Kernel(const Variant& variant, const NodeReader& node) : WeightedKernel(node) {
  const int64_t hidden = read_activated_weight(node, variant.activation, variant.gated);
  // One linear: the same in every format.
  read_tensors(node, Activation::none, {}, 1, "down_");
  const spmm::Weight &first = weight(0), &second = weight(1);
  if (static_cast<int64_t>(second.K) != hidden) {
    node.fail("attribute down_K is " + std::to_string(second.K) + ", expected the " +
              std::to_string(hidden) + " outputs of the first weight");
  }
  node.log(std::string("kernel ") + spmm::select_kernel(features_, first, second, SIZE_MAX).name);
}

void Kernel::compute(OrtKernelContext* context) const {
  const spmm::Weight &first = weight(0), &second = weight(1);
  const InputTensor x = rows_input(context);
  std::vector<int64_t> dims = x.dims;
  dims.back() = static_cast<int64_t>(second.N);
  float* y = float_output(api_, context, 0, dims);
  if (x.elements == 0) return;

  const spmm::Plan plan = spmm::make_plan(first, second, x.elements / first.K, features_, threads());
  run_planned(context, x, plan.scratch_bytes, [&](void* scratch, Workers& workers) {
    return spmm::run(plan, first, second, x.data, y, scratch, workers);
  });
}

void Kernel::infer_shape(const OrtApi& api, const Variant&, OrtShapeInferContext* context) {
  infer_pair_shape(api, context);
}

}  // namespace

std::vector<const OrtCustomOp*> sparse_feed_forward_ops(const OrtApi& api) { return make_ops<Kernel>(api); }

}  // namespace sparse_ops
