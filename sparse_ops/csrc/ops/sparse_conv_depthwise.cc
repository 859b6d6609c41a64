// The operators SparseConvDepthwise*, one op type per activation; contract in
// sparse_ops/ops/sparse_conv_depthwise.py.

#include "ops/operators.h"

#include "kernels/spconv/fused_depthwise.h"
#include "kernels/spmm/spmm.h"
#include "ops/op_set.h"
#include "ops/op_support.h"
#include "ops/weighted_kernel.h"
#include "ops/window.h"

namespace sparse_ops {
namespace {

using spconv::MapEpilogue;
using enum MapEpilogue::Activation;

struct DepthwiseVariant {
  const char* name;
  MapEpilogue::Activation activation;
  bool has_limits;  // of the clip, as attributes; otherwise it is ReLU
};

// Of the attributes of the depthwise convolution.
constexpr const char* kPrefix = "depthwise_";

class Kernel : public WeightedKernel<> {
 public:
  using Variant = DepthwiseVariant;
  static constexpr Variant kVariants[] = {
      {"SparseConvDepthwiseRelu", clip, false},
      {"SparseConvDepthwiseClip", clip, true},
      {"SparseConvDepthwiseSilu", silu, false},
      {"SparseConvDepthwiseHardSwish", hard_swish, false},
  };
  static size_t input_count(const Variant&) { return kFilterBias + 1; }
  static void infer_shape(const OrtApi& api, const Variant&, OrtShapeInferContext* context);

  Kernel(const Variant& variant, const NodeReader& node);
  void compute(OrtKernelContext* context) const;

 private:
  // The filters of the depthwise convolution come behind the weight of the first, then their bias.
  static constexpr size_t kFilters = kBehindWeights, kFilterBias = kFilters + 1;

  MapEpilogue epilogue_;
  size_t axes_;
  spconv::Axis rows_, columns_, depthwise_rows_, depthwise_columns_;
  const unsigned char* filters_;
  const unsigned char* filter_bias_;
};

Kernel::Kernel(const Variant& variant, const NodeReader& node) : WeightedKernel(node) {
  const Window first = Window::read("", node), depthwise = Window::read(kPrefix, node);
  if (first.axes() != depthwise.axes()) node.fail("kernel_shape and depthwise_kernel_shape differ in length");
  axes_ = first.axes();
  rows_ = first.rows();
  columns_ = first.columns();
  depthwise_rows_ = depthwise.rows();
  depthwise_columns_ = depthwise.columns();
  epilogue_ = read_epilogue(node, variant.activation, variant.has_limits);
  read_weight(node);
  first.check_fits(node, weight().K);
  const size_t taps = depthwise_rows_.kernel * depthwise_columns_.kernel;
  const auto constant = [&](size_t index, const char* name, size_t count) {
    const NodeReader::Constant found = node.constant(index, name, ORT_FLOAT);
    if (found.count != count) {
      node.fail(std::string("input ") + name + " has " + std::to_string(found.count) +
                " elements, expected " + std::to_string(count));
    }
    return static_cast<const unsigned char*>(found.data);
  };
  filters_ = constant(kFilters, "filters", weight().N * taps);
  filter_bias_ = constant(kFilterBias, "filter_bias", weight().N);
  node.log("kernel " + kernel_name());
}

void Kernel::compute(OrtKernelContext* context) const {
  const spconv::FusedDepthwise fused{{weight(), rows_, columns_, 1, epilogue_},
                                     depthwise_rows_,
                                     depthwise_columns_,
                                     filters_,
                                     filter_bias_};
  const auto [x, batch, height, width] = images_input(api_, context, where_, fused.first.channels(), axes_);
  const size_t between_height = spconv::output_size(rows_, height);
  const size_t between_width = spconv::output_size(columns_, width);
  const size_t out_height = spconv::output_size(depthwise_rows_, between_height);
  const size_t out_width = spconv::output_size(depthwise_columns_, between_width);
  const bool between = between_height > 0 && between_width > 0;
  if (!between || out_height == 0 || out_width == 0) {
    throw InvalidError{where_ + ": the windows do not fit into input X of shape " + text_of(x.dims) +
                       " with their padding"};
  }
  float* y = float_output(api_, context, 0,
                          images_dims(axes_, batch, weight().N, out_height, out_width));
  if (batch == 0) return;

  const spconv::FusedPlan plan = spconv::make_plan(fused, batch, height, width, features_, threads());
  run_planned(context, x, plan.scratch_bytes, [&](void* scratch, Workers& workers) {
    return spconv::run(plan, fused, x.data, y, scratch, workers);
  });
}

void Kernel::infer_shape(const OrtApi& api, const Variant&, OrtShapeInferContext* context) {
  SymbolicShape shape;
  if (!input_shape(api, context, 0, shape)) return;
  for (const char* prefix : {"", kPrefix}) {
    const Window window =
        Window::read(prefix, [&](const char* name) { return integers_attribute(api, context, name); });
    // Refused when the kernel is created, or when it runs.
    if (!window.problem().empty() || shape.dims.size() != 2 + window.axes()) return;
    window.infer(shape, integer_attribute(api, context, "N"));
  }
  set_output_shape(api, context, 0, shape);
}

}  // namespace

std::vector<const OrtCustomOp*> sparse_conv_depthwise_ops(const OrtApi& api) { return make_ops<Kernel>(api); }

}  // namespace sparse_ops
