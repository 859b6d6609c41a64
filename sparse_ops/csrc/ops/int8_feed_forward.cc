// The operators Int8FeedForward* and SparseInt8FeedForward*, one op type per SparseFeedForward*; contract in
// sparse_ops/ops/int8_feed_forward.py.

#include "ops/operators.h"

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "kernels/quads/feed_forward.h"
#include "ops/int8_weight.h"
#include "ops/matmul_variants.h"
#include "ops/op_set.h"
#include "ops/op_support.h"

namespace sparse_ops {
namespace {

// What the name of an operator says: the first linear, and whether all quads are stored.
struct PairVariant {
  char name[48];
  MatMulVariant first;
  bool dense;
};

constexpr bool is_first(const MatMulVariant& product) { return product.outputs == 1; }

constexpr size_t count_firsts() {
  size_t count = 0;
  for (const MatMulVariant& product : kMatMuls) count += is_first(product);
  return count;
}

constexpr auto make_variants() {
  constexpr std::string_view kPlain = kMatMuls[0].name;
  std::array<PairVariant, 2 * count_firsts()> all{};
  size_t i = 0;
  for (const bool dense : {true, false}) {
    for (const MatMulVariant& product : kMatMuls) {
      if (!is_first(product)) continue;
      PairVariant& own = all[i++];
      own.first = product;
      own.dense = dense;
      const std::string_view what = std::string_view(product.name).substr(kPlain.size());
      join_words({dense ? "Int8FeedForward" : "SparseInt8FeedForward", what}, own.name);
    }
  }
  return all;
}

class Kernel {
 public:
  using Variant = PairVariant;
  static constexpr auto kVariants = make_variants();
  static OrtElementType input_type(const Variant& variant, size_t i) {
    const std::span<const Part> parts = int8_parts(variant.dense);
    const size_t part = i == 0 ? parts.size() : (i - 1) % (parts.size() + 1);
    return part < parts.size() ? parts[part].type : ORT_FLOAT;
  }
  static size_t input_count(const Variant& variant) { return 1 + 2 * inputs_of_weight(variant); }
  static size_t output_count(const Variant& /*variant*/) { return 1; }
  static void infer_shape(const OrtApi& api, const Variant&, OrtShapeInferContext* context);

  Kernel(const Variant& variant, const NodeReader& node);
  void compute(OrtKernelContext* context) const;

 private:
  static size_t inputs_of_weight(const Variant& variant) { return int8_parts(variant.dense).size() + 1; }

  const OrtApi& api_;
  const std::string where_;
  const Features features_;
  mutable ThreadCount threads_;
  int8_quads::CheckedWeight first_, second_;
};

Kernel::Kernel(const Variant& variant, const NodeReader& node)
    : api_(node.api()), where_(node.where()), features_(node.features()) {
  node.expect("format", variant.dense ? int8_quads::kDenseFormat : int8_quads::kFormat);
  read_int8_weight(node, variant.dense, variant.first.activation, 1, "", first_);
  quads::Weight &first = first_.weight, &second = second_.weight;
  first.gated = variant.first.gated;
  const std::vector<int64_t> outputs = read_outputs(node, variant.first, first.N, first.block);
  const size_t behind = 1 + inputs_of_weight(variant);
  read_int8_weight(node, variant.dense, quads::Activation::none, behind, "down_", second_);
  if (static_cast<int64_t>(second.K) != outputs[0]) {
    node.fail("attribute down_K is " + std::to_string(second.K) + ", expected the " +
              std::to_string(outputs[0]) + " outputs of the first weight");
  }
  node.log(std::string("kernel ") + quads::select_kernel(features_, first, second, SIZE_MAX).name);
}

void Kernel::compute(OrtKernelContext* context) const {
  const quads::Weight &first = first_.weight, &second = second_.weight;
  const InputTensor x = rows_input(api_, context, where_, first.K);
  std::vector<int64_t> dims = x.dims;
  dims.back() = static_cast<int64_t>(second.N);
  float* y = float_output(api_, context, 0, dims);
  if (x.elements == 0) return;
  const quads::Plan plan =
      quads::make_plan(first, second, x.elements / first.K, features_, threads_.expected());
  const Scratch scratch(api_, context, x.value, plan.scratch_bytes);
  SessionWorkers workers(api_, context, &threads_);
  if (!quads::run(plan, first, second, x.data, y, scratch.get(), workers)) check_status(workers.status());
}

void Kernel::infer_shape(const OrtApi& api, const Variant&, OrtShapeInferContext* context) {
  infer_pair_shape(api, context);
}

}  // namespace

std::vector<const OrtCustomOp*> int8_feed_forward_ops(const OrtApi& api) { return make_ops<Kernel>(api); }

}  // namespace sparse_ops
