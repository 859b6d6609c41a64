// The operators Int8MatMul*, SparseInt8MatMul*, QMatMul* and SparseQMatMul*, one op type per SparseMatMul*;
// contracts in sparse_ops/ops/int8_matmul.py and sparse_ops/ops/q_matmul.py.

#include "ops/operators.h"

#include <array>
#include <iterator>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/quads/quads.h"
#include "ops/int8_weight.h"
#include "ops/matmul_variants.h"
#include "ops/op_set.h"
#include "ops/op_support.h"

namespace sparse_ops {
namespace {

constexpr std::string_view kSparse = "Sparse";

// How operators differ from SparseMatMul*.
struct Kind {
  std::string_view word;  // in the place of kSparse
  bool dense;             // all quads are stored
  bool bytes;             // X is rounded already
};
constexpr Kind kKinds[] = {{"Int8", true, false},
                           {"SparseInt8", false, false},
                           {"Q", true, true},
                           {"SparseQ", false, true}};

// What the name of an operator says.
struct Int8Variant {
  char name[48];
  MatMulVariant product;
  bool dense, bytes;
};

constexpr auto make_variants() {
  std::array<Int8Variant, std::size(kKinds) * std::size(kMatMuls)> all{};
  size_t i = 0;
  for (const Kind& kind : kKinds) {
    for (const MatMulVariant& product : kMatMuls) {
      Int8Variant& own = all[i++];
      own.product = product;
      own.dense = kind.dense;
      own.bytes = kind.bytes;
      join_words({kind.word, std::string_view(product.name).substr(kSparse.size())}, own.name);
    }
  }
  return all;
}

class Kernel {
 public:
  using Variant = Int8Variant;
  static constexpr auto kVariants = make_variants();
  static OrtElementType input_type(const Variant& variant, size_t i) {
    const std::span<const Part> parts = int8_parts(variant.dense);
    if (i == 0)
      return variant.bytes ? ORT_UNDEFINED : ORT_FLOAT;  // of two types, which the kernel tells apart
    if (i == parts.size() + 3) return ORT_UNDEFINED;
    return i > parts.size() ? ORT_FLOAT : parts[i - 1].type;
  }
  static size_t input_count(const Variant& variant) {
    return int8_parts(variant.dense).size() + 2 + (variant.bytes ? 2 : 0);
  }
  static size_t output_count(const Variant& variant) { return variant.product.outputs; }
  static void infer_shape(const OrtApi& api, const Variant& variant, OrtShapeInferContext* context) {
    infer_product_shapes(api, context, variant.product.outputs, variant.product.gated);
  }

  Kernel(const Variant& variant, const NodeReader& node);
  void compute(OrtKernelContext* context) const;

 private:
  const OrtApi& api_;
  const std::string where_;
  const Features features_;
  mutable ThreadCount threads_;
  int8_quads::CheckedWeight checked_;
  std::vector<int64_t> split_;  // channels of each output
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
  read_int8_weight(node, variant.dense, variant.product.activation, 1, "", checked_);
  quads::Weight& weight = checked_.weight;
  weight.gated = variant.product.gated;
  split_ = read_outputs(node, variant.product, weight.N, weight.block);
  if (bytes_) {
    weight.grid = read_grid(node);
    is_signed_ = read_lowest(node) != 0;
  }
  node.log(std::string("kernel ") + quads::select_kernel(features_, weight, SIZE_MAX).name);
}

void Kernel::compute(OrtKernelContext* context) const {
  const quads::Weight& weight = checked_.weight;
  const auto run = [&](const auto& x, const auto& tokens) {
    std::vector<int64_t> dims = x.dims;
    quads::Output outputs[kMaxOutputs];
    for (size_t i = 0; i < split_.size(); ++i) {
      dims.back() = split_[i];
      outputs[i] = {float_output(api_, context, i, dims), static_cast<size_t>(split_[i])};
    }
    if (x.elements == 0) return;
    const quads::Plan plan = quads::make_plan(weight, x.elements / weight.K, features_, threads_.expected());
    const Scratch scratch(api_, context, x.value, plan.scratch_bytes);
    SessionWorkers workers(api_, context, &threads_);
    const std::span<const quads::Output> used(outputs, split_.size());
    if (!quads::run(plan, weight, tokens, used, scratch.get(), workers)) check_status(workers.status());
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

}  // namespace

std::vector<const OrtCustomOp*> int8_matmul_ops(const OrtApi& api) { return make_ops<Kernel>(api); }

}  // namespace sparse_ops
