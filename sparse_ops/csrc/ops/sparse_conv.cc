// The operators SparseConv*, one op type per activation, with and without a residual; contract in
// sparse_ops/ops/sparse_conv.py.

#include "ops/operators.h"

#include <string>
#include <vector>

#include "kernels/spconv/spconv.h"
#include "kernels/spmm/spmm.h"
#include "ops/op_set.h"
#include "ops/op_support.h"
#include "ops/weighted_kernel.h"
#include "ops/window.h"

namespace sparse_ops {
namespace {

using spconv::MapEpilogue;

// What the name of an operator says.
struct ConvVariant {
  const char* name;
  bool residual;
  MapEpilogue::Activation activation;
  bool has_limits;  // of the clip, as attributes; otherwise it is ReLU
};
using enum MapEpilogue::Activation;

class Kernel : public WeightedKernel<> {
 public:
  using Variant = ConvVariant;
  static constexpr Variant kVariants[] = {
      {"SparseConv", false, none, false},
      {"SparseConvRelu", false, clip, false},
      {"SparseConvClip", false, clip, true},
      {"SparseConvSilu", false, silu, false},
      {"SparseConvHardSwish", false, hard_swish, false},
      {"SparseConvAdd", true, none, false},
      {"SparseConvAddRelu", true, clip, false},
      {"SparseConvAddClip", true, clip, true},
      {"SparseConvAddSilu", true, silu, false},
      {"SparseConvAddHardSwish", true, hard_swish, false},
  };
  static size_t input_count(const Variant& variant) { return kBehindWeights + variant.residual; }
  static void infer_shape(const OrtApi& api, const Variant&, OrtShapeInferContext* context);

  Kernel(const Variant& variant, const NodeReader& node);
  void compute(OrtKernelContext* context) const;

 private:
  bool residual_;
  MapEpilogue epilogue_;
  size_t axes_;
  spconv::Axis rows_, columns_;
  size_t group_;
};

Kernel::Kernel(const Variant& variant, const NodeReader& node)
    : WeightedKernel(node), residual_(variant.residual) {
  const Window window = Window::read("", node);
  axes_ = window.axes();
  rows_ = window.rows();
  columns_ = window.columns();
  epilogue_ = read_epilogue(node, variant.activation, variant.has_limits);
  read_weight(node);
  window.check_fits(node, weight().K);
  group_ = read_group(node, weight().N, weight().block);
  size_t channels;
  if (__builtin_mul_overflow(weight().K / (rows_.kernel * columns_.kernel), group_, &channels) || channels > size_t{1} << 48) {
    node.fail("attributes K and group are too large");
  }
  node.log("kernel " + kernel_name());
}

void Kernel::compute(OrtKernelContext* context) const {
  const spconv::Convolution conv{weight(), rows_, columns_, group_, epilogue_};
  const auto images = images_input(api_, context, where_, conv.channels(), axes_);
  const auto& [x, batch, height, width] = images;
  const auto [out_height, out_width] = output_sizes(images, where_, conv.rows, conv.columns);
  const std::vector<int64_t> dims = images_dims(axes_, batch, conv.weight.N, out_height, out_width);
  const float* residual = nullptr;
  if (residual_) {
    const InputTensor r = float_input(api_, context, kBehindWeights);
    if (r.dims != dims) {
      throw InvalidError{where_ + ": input R has shape " + text_of(r.dims) + ", expected " + text_of(dims) +
                         ", the shape of Y"};
    }
    residual = r.data;
  }
  float* y = float_output(api_, context, 0, dims);
  if (batch == 0) return;

  const spconv::Plan plan = spconv::make_plan(conv, batch, height, width, features_, threads());
  run_planned(context, x, plan.scratch_bytes, [&](void* scratch, Workers& workers) {
    return spconv::run(plan, conv, x.data, residual, y, scratch, workers);
  });
}

void Kernel::infer_shape(const OrtApi& api, const Variant&, OrtShapeInferContext* context) {
  SymbolicShape shape;
  if (!input_shape(api, context, 0, shape)) return;
  const Window window =
      Window::read("", [&](const char* name) { return integers_attribute(api, context, name); });
  // Refused when the kernel is created, or when it runs.
  if (!window.problem().empty() || shape.dims.size() != 2 + window.axes()) return;
  window.infer(shape, integer_attribute(api, context, "N"));
  set_output_shape(api, context, 0, shape);
}

}  // namespace

std::vector<const OrtCustomOp*> sparse_conv_ops(const OrtApi& api) { return make_ops<Kernel>(api); }

}  // namespace sparse_ops
