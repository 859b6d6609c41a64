// The operators Int8MatMul*, SparseInt8MatMul*, QMatMul* and SparseQMatMul*, one op type per activation;
// contracts in sparse_ops/ops/int8_matmul.py and sparse_ops/ops/q_matmul.py.

#include "ops/operators.h"

#include <iterator>
#include <limits>
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
  bool bytes = false;  // X is rounded already
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
                                          {"SparseInt8MatMulQuickGelu", Activation::quick_gelu, false},
                                          {"QMatMul", Activation::none, true, true},
                                          {"QMatMulRelu", Activation::relu, true, true},
                                          {"QMatMulGelu", Activation::gelu, true, true},
                                          {"QMatMulGeluTanh", Activation::gelu_tanh, true, true},
                                          {"QMatMulSilu", Activation::silu, true, true},
                                          {"QMatMulQuickGelu", Activation::quick_gelu, true, true},
                                          {"SparseQMatMul", Activation::none, false, true},
                                          {"SparseQMatMulRelu", Activation::relu, false, true},
                                          {"SparseQMatMulGelu", Activation::gelu, false, true},
                                          {"SparseQMatMulGeluTanh", Activation::gelu_tanh, false, true},
                                          {"SparseQMatMulSilu", Activation::silu, false, true},
                                          {"SparseQMatMulQuickGelu", Activation::quick_gelu, false, true}};
  static OrtElementType input_type(const Variant& variant, size_t i) {
    const std::span<const Part> parts = parts_of(variant);
    if (i == 0)
      return variant.bytes ? ORT_UNDEFINED : ORT_FLOAT;  // of two types, which the kernel tells apart
    if (i == parts.size() + 3) return ORT_UNDEFINED;
    return i > parts.size() ? ORT_FLOAT : parts[i - 1].type;
  }
  static size_t input_count(const Variant& variant) {
    return parts_of(variant).size() + 2 + (variant.bytes ? 2 : 0);
  }
  static size_t output_count(const Variant& /*variant*/) { return 1; }
  static void infer_shape(const OrtApi& api, const Variant& variant, OrtShapeInferContext* context);

  Kernel(const Variant& variant, const NodeReader& node);
  void compute(OrtKernelContext* context) const;

 private:
  const OrtApi& api_;
  const std::string where_;
  const Features features_;
  mutable ThreadCount threads_;
  int8_quads::CheckedWeight checked_;
  const bool bytes_;
  const size_t input_count_;
  bool is_signed_ = false;  // of bytes
};

// The grid of results.
quads::Grid read_grid(const NodeReader& node) {
  const auto within = [&](const char* name, int64_t low, int64_t high) {
    const int64_t found = node.integer(name);
    if (found < low || found > high) {
      node.fail(std::string("attribute ") + name + " is " + std::to_string(found) + ", expected " +
                std::to_string(low) + ".." + std::to_string(high));
    }
    return found;
  };
  constexpr int64_t kMost = 65535;
  constexpr float kSmallest = 1e-30f;
  quads::Grid grid;
  grid.size = node.number("h_scale");
  if (grid.size != 0 && !(grid.size >= kSmallest && grid.size < std::numeric_limits<float>::infinity())) {
    node.fail("attribute h_scale is neither 0 nor a finite number from 1e-30 on");
  }
  const int64_t low = within("h_low", -kMost, kMost);
  grid.low = static_cast<float>(low);
  grid.high = static_cast<float>(within("h_high", low, kMost));
  return grid;
}

// The lowest number that bytes have.
int64_t read_lowest(const NodeReader& node) {
  const int64_t lowest = node.integer("x_lowest");
  if (lowest != 0 && lowest != -128) node.fail("attribute x_lowest is neither 0 nor -128");
  return lowest;
}

Kernel::Kernel(const Variant& variant, const NodeReader& node)
    : api_(node.api()),
      where_(node.where()),
      features_(node.features()),
      bytes_(variant.bytes),
      input_count_(input_count(variant)) {
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
  if (bytes_) {
    checked_.weight.grid = read_grid(node);
    is_signed_ = read_lowest(node) != 0;
  }
  node.log(std::string("kernel ") + quads::select_kernel(features_, checked_.weight, SIZE_MAX).name);
}

void Kernel::compute(OrtKernelContext* context) const {
  const quads::Weight& weight = checked_.weight;
  const auto run = [&](const auto& x, const auto& tokens) {
    std::vector<int64_t> dims = x.dims;
    dims.back() = static_cast<int64_t>(weight.N);
    float* y = float_output(api_, context, 0, dims);
    if (x.elements == 0) return;
    const quads::Plan plan = quads::make_plan(weight, x.elements / weight.K, features_, threads_.expected());
    const Scratch scratch(api_, context, x.value, plan.scratch_bytes);
    SessionWorkers workers(api_, context, &threads_);
    if (!quads::run(plan, weight, tokens, y, scratch.get(), workers)) check_status(workers.status());
  };
  if (!bytes_) {
    const InputTensor x = rows_input(api_, context, where_, weight.K);
    return run(x, x.data);
  }
  const ByteTensor x = byte_input(api_, context, where_, 0, "X");
  expect_rows(x.dims, where_, weight.K);
  const size_t behind = input_count_ - 2;
  const InputTensor scale = float_input(api_, context, behind);
  const ByteTensor zero = byte_input(api_, context, where_, behind + 1, "x_zero_point");
  if (scale.elements != 1 || zero.elements != 1) {
    throw InvalidError{where_ + ": inputs x_scale and x_zero_point must have one element each"};
  }
  for (const ByteTensor* bytes : {&x, &zero}) {
    if (bytes->is_signed != is_signed_) {
      throw InvalidError{where_ + ": inputs X and x_zero_point must both be " +
                         (is_signed_ ? "int8" : "uint8") + ", as x_lowest says"};
    }
  }
  const auto point = static_cast<unsigned char>(*zero.data ^ (is_signed_ ? 128 : 0));
  run(x, quads::Bytes{x.data, is_signed_, point, *scale.data});
}

void Kernel::infer_shape(const OrtApi& api, const Variant& /*variant*/, OrtShapeInferContext* context) {
  SymbolicShape shape;
  if (!input_shape(api, context, 0, shape)) return;
  shape.dims.back() = integer_attribute(api, context, "N");
  shape.names.back() = "";
  set_output_shape(api, context, 0, shape);
}

}  // namespace

std::vector<const OrtCustomOp*> int8_matmul_ops(const OrtApi& api) { return make_ops<Kernel>(api); }

}  // namespace sparse_ops
