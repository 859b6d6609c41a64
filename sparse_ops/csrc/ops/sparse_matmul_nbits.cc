// The operators SparseMatMulInt*, one op type per layout of the weight and per SparseMatMul*; contract in
// sparse_ops/ops/sparse_matmul_nbits.py.

#include "ops/operators.h"

#include <array>
#include <iterator>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "formats/nbits.h"
#include "kernels/nbits/nbits.h"
#include "ops/matmul_variants.h"
#include "ops/op_set.h"
#include "ops/op_support.h"

namespace sparse_ops {
namespace {

using nbits::Layout;

struct StoredLayout {
  std::string_view word;  // behind SparseMatMul
  Layout layout;
  const char* format;
  bool has_zeros = false;
  constexpr bool has_masks() const { return layout != Layout::n_of_16; }
};
constexpr StoredLayout kLayouts[] = {{"Int4", Layout::bitmap4, "bitmap4"},
                                     {"Int4WithZeros", Layout::bitmap4, "bitmap4", true},
                                     {"Int8", Layout::bitmap8, "bitmap8"},
                                     {"Int4Of16", Layout::n_of_16, "n_of_16"},
                                     {"Int4Of16WithZeros", Layout::n_of_16, "n_of_16", true}};

// What the name of an operator says.
struct IntegerVariant {
  char name[48];
  StoredLayout stored;
  MatMulVariant product;
};

constexpr auto make_variants() {
  std::array<IntegerVariant, std::size(kLayouts) * std::size(kMatMuls)> all{};
  size_t i = 0;
  for (const StoredLayout& stored : kLayouts) {
    for (const MatMulVariant& product : kMatMuls) {
      IntegerVariant& own = all[i++];
      own.stored = stored;
      own.product = product;
      const std::string_view head = kMatMuls[0].name, tail = product.name;
      size_t length = 0;
      for (std::string_view part : {head, stored.word, tail.substr(head.size())}) {
        for (char letter : part) own.name[length++] = letter;
      }
    }
  }
  return all;
}

class Kernel {
 public:
  using Variant = IntegerVariant;
  static constexpr auto kVariants = make_variants();
  static OrtElementType input_type(const Variant& variant, size_t i) {
    const size_t scales = size_t{2} + variant.stored.has_masks();
    if (i == 0 || i + 1 == input_count(variant)) return ORT_FLOAT;
    return i == scales ? ORT_FLOAT16 : ORT_UINT8;
  }
  static size_t input_count(const Variant& variant) {
    return size_t{4} + variant.stored.has_masks() + variant.stored.has_zeros;
  }
  static size_t output_count(const Variant& variant) { return variant.product.outputs; }
  static void infer_shape(const OrtApi& api, const Variant& variant, OrtShapeInferContext* context) {
    infer_product_shapes(api, context, variant.product.outputs, variant.product.gated);
  }

  Kernel(const Variant& variant, const NodeReader& node);
  void compute(OrtKernelContext* context) const;

 private:
  const OrtApi& api_;
  std::string where_;
  nbits::CheckedWeight checked_;
  std::vector<int64_t> split_;  // channels of each output
  const nbits::Kernel* kernel_;
  mutable ThreadCount threads_;
};

Kernel::Kernel(const Variant& variant, const NodeReader& node) : api_(node.api()), where_(node.where()) {
  node.expect("format", variant.stored.format);
  nbits::StoredWeight stored{};
  stored.layout = variant.stored.layout;
  stored.K = node.integer("K");
  stored.N = node.integer("N");
  stored.group = node.integer("group");
  size_t next = 1;
  const auto input = [&](const char* name, OrtElementType type) {
    const NodeReader::Constant found = node.constant(next++, name, type);
    return RawArray{found.data, found.count};
  };
  if (variant.stored.has_masks()) {
    stored.masks = input("masks", ORT_UINT8);
  } else {
    stored.kept = node.integer("kept");
  }
  stored.values = input("values", ORT_UINT8);
  stored.scales = input("scales", ORT_FLOAT16);
  stored.has_zeros = variant.stored.has_zeros;
  if (stored.has_zeros) stored.zeros = input("zeros", ORT_UINT8);
  stored.bias = input("bias", ORT_FLOAT);
  const std::string problem = nbits::check(stored, variant.product.activation, checked_);
  if (!problem.empty()) node.fail(problem);
  nbits::Weight& weight = checked_.weight;
  weight.gated = variant.product.gated;
  split_ = read_outputs(node, variant.product, weight.N, nbits::kBlock);
  kernel_ = &nbits::select_kernel(node.features());
  node.log(std::string("kernel ") + kernel_->name);
}

void Kernel::compute(OrtKernelContext* context) const {
  const nbits::Weight& weight = checked_.weight;
  const InputTensor x = rows_input(api_, context, where_, weight.K);
  std::vector<int64_t> dims = x.dims;
  nbits::Output outputs[kMaxOutputs];
  for (size_t i = 0; i < split_.size(); ++i) {
    dims.back() = split_[i];
    outputs[i] = {float_output(api_, context, i, dims), static_cast<size_t>(split_[i])};
  }
  if (x.elements == 0) return;
  const size_t tokens = x.elements / weight.K;
  const Scratch scratch(api_, context, x.value, nbits::scratch_bytes(weight, tokens));
  SessionWorkers workers(api_, context, &threads_);
  if (!nbits::run(*kernel_, weight, x.data, tokens, {outputs, split_.size()}, scratch.get(),
                  threads_.expected(), workers)) {
    check_status(workers.status());
  }
}

}  // namespace

std::vector<const OrtCustomOp*> sparse_matmul_nbits_ops(const OrtApi& api) { return make_ops<Kernel>(api); }

}  // namespace sparse_ops
