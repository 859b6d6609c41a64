// The operators Int8MatMul* and SparseInt8MatMul*, one op type per activation; contract in
// sparse_ops/ops/int8_matmul.py.

#include "ops/operators.h"

#include <iterator>
#include <span>
#include <string>
#include <vector>

#include "formats/int8_quads.h"
#include "kernels/quads/quads.h"
#include "ops/op_set.h"
#include "ops/op_support.h"

namespace sparse_ops {
namespace {

using spmm::Activation;

// What the name of an operator says.
struct Int8Variant {
  const char* name;
  Activation activation;
  bool dense;  // all quads are stored
};

std::span<const Part> parts_of(const Int8Variant& variant) {
  return variant.dense ? std::span<const Part>(int8_quads::kDenseParts) : int8_quads::kParts;
}

class Kernel {
 public:
  using Variant = Int8Variant;
  static constexpr Variant kVariants[] = {{"Int8MatMul", Activation::none, true},
                                          {"Int8MatMulRelu", Activation::relu, true},
                                          {"Int8MatMulGelu", Activation::gelu, true},
                                          {"Int8MatMulGeluTanh", Activation::gelu_tanh, true},
                                          {"Int8MatMulSilu", Activation::silu, true},
                                          {"Int8MatMulQuickGelu", Activation::quick_gelu, true},
                                          {"SparseInt8MatMul", Activation::none, false},
                                          {"SparseInt8MatMulRelu", Activation::relu, false},
                                          {"SparseInt8MatMulGelu", Activation::gelu, false},
                                          {"SparseInt8MatMulGeluTanh", Activation::gelu_tanh, false},
                                          {"SparseInt8MatMulSilu", Activation::silu, false},
                                          {"SparseInt8MatMulQuickGelu", Activation::quick_gelu, false}};
  static OrtElementType input_type(const Variant& variant, size_t i) {
    const std::span<const Part> parts = parts_of(variant);
    return i == 0 || i > parts.size() ? ORT_FLOAT : parts[i - 1].type;
  }
  static size_t input_count(const Variant& variant) { return parts_of(variant).size() + 2; }
  static size_t output_count(const Variant& /*variant*/) { return 1; }
  static void infer_shape(const OrtApi& api, const Variant& /*variant*/, OrtShapeInferContext* context) {
    infer_product_shapes(api, context);
  }

  Kernel(const Variant& variant, const NodeReader& node);
  void compute(OrtKernelContext* context) const;

 private:
  const OrtApi& api_;
  const std::string where_;
  const Features features_;
  mutable ThreadCount threads_;
  int8_quads::CheckedWeight checked_;
};

Kernel::Kernel(const Variant& variant, const NodeReader& node)
    : api_(node.api()), where_(node.where()), features_(node.features()) {
  node.expect("format", variant.dense ? int8_quads::kDenseFormat : int8_quads::kFormat);
  const std::span<const Part> parts = parts_of(variant);
  std::vector<RawArray> arrays;
  const auto input = [&](size_t place, const char* name, OrtElementType type) {
    const NodeReader::Constant found = node.constant(place, name, type);
    return RawArray{found.data, found.count};
  };
  for (const Part& part : parts) arrays.push_back(input(arrays.size() + 1, part.name, part.type));
  const RawArray bias = input(arrays.size() + 1, "bias", ORT_FLOAT);
  int64_t sizes[std::size(int8_quads::kSizes)];
  for (size_t i = 0; i < std::size(sizes); ++i) sizes[i] = node.integer(int8_quads::kSizes[i]);
  const std::string problem = int8_quads::check({sizes, arrays, bias}, variant.activation, checked_);
  if (!problem.empty()) node.fail(problem);
  node.log(std::string("kernel ") + quads::select_kernel(features_, checked_.weight, SIZE_MAX).name);
}

void Kernel::compute(OrtKernelContext* context) const {
  const quads::Weight& weight = checked_.weight;
  const InputTensor x = rows_input(api_, context, where_, weight.K);
  std::vector<int64_t> dims = x.dims;
  dims.back() = static_cast<int64_t>(weight.N);
  float* y = float_output(api_, context, 0, dims);
  if (x.elements == 0) return;
  const quads::Plan plan =
      quads::make_plan(weight, x.elements / weight.K, features_, threads_.expected());
  const Scratch scratch(api_, context, x.value, plan.scratch_bytes);
  SessionWorkers workers(api_, context, &threads_);
  if (!quads::run(plan, weight, x.data, y, scratch.get(), workers)) check_status(workers.status());
}

}  // namespace

std::vector<const OrtCustomOp*> int8_matmul_ops(const OrtApi& api) { return make_ops<Kernel>(api); }

}  // namespace sparse_ops
