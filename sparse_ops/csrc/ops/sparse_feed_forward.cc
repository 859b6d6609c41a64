#include "ops/sparse_feed_forward.h"

#include <string>

#include "kernels/spmm/feed_forward.h"
#include "ops/op_set.h"
#include "ops/op_support.h"
#include "ops/stored_weight.h"

namespace sparse_ops {
namespace {

using spmm::Activation;

// What the name of an operator says.
struct FeedForwardVariant {
  const char* name;
  Activation activation;
  bool gated = false;
};

// The second weight stands behind the first.
constexpr size_t kSecond = 1 + kWeightInputs;
constexpr const char* kPrefix = "down_";

class Kernel {
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
  static OrtElementType input_type(const Variant&, size_t i) { return weight_input_type(i, 2); }
  static size_t input_count(const Variant&) { return kSecond + kWeightInputs; }
  static size_t output_count(const Variant&) { return 1; }
  static void infer_shape(const OrtApi& api, const Variant&, OrtShapeInferContext* context);

  Kernel(const Variant& variant, const OrtApi& api, const OrtKernelInfo* info);
  void compute(OrtKernelContext* context) const;

 private:
  const OrtApi& api_;
  std::string where_;
  Features features_;
  mutable ThreadCount threads_;
  chunked_csc::CheckedWeight first_, second_;
};

Kernel::Kernel(const Variant& variant, const OrtApi& api, const OrtKernelInfo* info) : api_(api) {
  const NodeReader node(api, info, variant.name);
  where_ = node.where();
  features_ = node.features();
  int64_t hidden;
  if (variant.gated) {
    const auto halves = read_halves(node);
    read_gated_weight(node, variant.activation, first_, halves);
    hidden = halves[0];
  } else {
    read_weight(node, variant.activation, first_);
    hidden = static_cast<int64_t>(first_.weight.N);
  }
  // One linear: the same in every format.
  read_tensors(node, Activation::none, second_, {}, kPrefix, kSecond);
  if (static_cast<int64_t>(second_.weight.K) != hidden) {
    node.fail("attribute down_K is " + std::to_string(second_.weight.K) + ", expected the " +
              std::to_string(hidden) + " outputs of the first weight");
  }
  node.log(std::string("kernel ") +
           spmm::select_kernel(features_, first_.weight, second_.weight, SIZE_MAX).name);
}

void Kernel::compute(OrtKernelContext* context) const {
  const spmm::Weight &first = first_.weight, &second = second_.weight;
  const InputTensor x = rows_input(api_, context, where_, first.K);
  std::vector<int64_t> dims = x.dims;
  dims.back() = static_cast<int64_t>(second.N);
  float* y = float_output(api_, context, 0, dims);
  if (x.elements == 0) return;

  const spmm::Plan plan =
      spmm::make_plan(first, second, x.elements / first.K, features_, threads_.expected());
  const Scratch scratch(api_, context, x.value, plan.scratch_bytes);
  SessionWorkers workers(api_, context, &threads_);
  if (!spmm::run(plan, first, second, x.data, y, scratch.get(), workers)) check_status(workers.status());
}

void Kernel::infer_shape(const OrtApi& api, const Variant&, OrtShapeInferContext* context) {
  SymbolicShape shape;
  if (!input_shape(api, context, 0, shape)) return;
  shape.names.back() = "";
  shape.dims.back() = integer_attribute(api, context, "down_N");
  set_output_shape(api, context, 0, shape);
}

}  // namespace

std::vector<const OrtCustomOp*> sparse_feed_forward_ops(const OrtApi& api) { return make_ops<Kernel>(api); }

}  // namespace sparse_ops
