// The operators SparseMatMulInt*, one op type per layout of the weight; contract in
// sparse_ops/ops/sparse_matmul_nbits.py.

#include "ops/operators.h"

#include <string>
#include <vector>

#include "formats/nbits.h"
#include "kernels/nbits/nbits.h"
#include "ops/op_set.h"
#include "ops/op_support.h"

namespace sparse_ops {
namespace {

using nbits::Layout;

// What the name of an operator says.
struct IntegerVariant {
  const char* name;
  Layout layout;
  const char* format;
  bool has_zeros = false;
  bool has_masks() const { return layout != Layout::n_of_16; }
};

class Kernel {
 public:
  using Variant = IntegerVariant;
  static constexpr Variant kVariants[] = {{"SparseMatMulInt4", Layout::bitmap4, "bitmap4"},
                                          {"SparseMatMulInt4WithZeros", Layout::bitmap4, "bitmap4", true},
                                          {"SparseMatMulInt8", Layout::bitmap8, "bitmap8"},
                                          {"SparseMatMulInt4Of16", Layout::n_of_16, "n_of_16"}};
  static OrtElementType input_type(const Variant& variant, size_t i) {
    if (i == 0) return ORT_FLOAT;
    return i == size_t{2} + variant.has_masks() ? ORT_FLOAT16 : ORT_UINT8;
  }
  static size_t input_count(const Variant& variant) {
    return size_t{3} + variant.has_masks() + variant.has_zeros;
  }
  static size_t output_count(const Variant&) { return 1; }
  static void infer_shape(const OrtApi& api, const Variant& variant, OrtShapeInferContext* context);

  Kernel(const Variant& variant, const NodeReader& node);
  void compute(OrtKernelContext* context) const;

 private:
  const OrtApi& api_;
  std::string where_;
  nbits::CheckedWeight checked_;
  const nbits::Kernel* kernel_;
  mutable ThreadCount threads_;
};

Kernel::Kernel(const Variant& variant, const NodeReader& node) : api_(node.api()), where_(node.where()) {
  node.expect("format", variant.format);
  nbits::StoredWeight stored{};
  stored.layout = variant.layout;
  stored.K = node.integer("K");
  stored.N = node.integer("N");
  stored.group = node.integer("group");
  size_t next = 1;
  const auto input = [&](const char* name, OrtElementType type) {
    const NodeReader::Constant found = node.constant(next++, name, type);
    return RawArray{found.data, found.count};
  };
  if (variant.has_masks()) {
    stored.masks = input("masks", ORT_UINT8);
  } else {
    stored.kept = node.integer("kept");
  }
  stored.values = input("values", ORT_UINT8);
  stored.scales = input("scales", ORT_FLOAT16);
  stored.has_zeros = variant.has_zeros;
  if (variant.has_zeros) stored.zeros = input("zeros", ORT_UINT8);
  const std::string problem = nbits::check(stored, checked_);
  if (!problem.empty()) node.fail(problem);
  kernel_ = &nbits::select_kernel(node.features());
  node.log(std::string("kernel ") + kernel_->name);
}

void Kernel::compute(OrtKernelContext* context) const {
  const nbits::Weight& weight = checked_.weight;
  const InputTensor x = rows_input(api_, context, where_, weight.K);
  std::vector<int64_t> dims = x.dims;
  dims.back() = static_cast<int64_t>(weight.N);
  float* y = float_output(api_, context, 0, dims);
  if (x.elements == 0) return;
  const size_t tokens = x.elements / weight.K;
  const Scratch scratch(api_, context, x.value, nbits::scratch_bytes(weight, tokens));
  SessionWorkers workers(api_, context, &threads_);
  if (!nbits::run(*kernel_, weight, x.data, tokens, y, scratch.get(), threads_.expected(), workers)) {
    check_status(workers.status());
  }
}

void Kernel::infer_shape(const OrtApi& api, const Variant&, OrtShapeInferContext* context) {
  SymbolicShape shape;
  if (!input_shape(api, context, 0, shape)) return;
  shape.names.back() = "";
  shape.dims.back() = integer_attribute(api, context, "N");
  set_output_shape(api, context, 0, shape);
}

}  // namespace

std::vector<const OrtCustomOp*> sparse_matmul_nbits_ops(const OrtApi& api) { return make_ops<Kernel>(api); }

}  // namespace sparse_ops
