// The operators SparseInt8Conv and SparseInt8ConvSigned; contract in sparse_ops/ops/int8_conv.py.

#include "ops/operators.h"

#include <cstring>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include "formats/int8_quads.h"
#include "kernels/quadconv/quadconv.h"
#include "ops/op_set.h"
#include "ops/op_support.h"
#include "ops/window.h"

namespace sparse_ops {
namespace {

// What the name of an operator says.
struct ConvVariant {
  const char* name;
  OrtElementType output;
  int64_t lowest;  // number that the output may be
};

class Kernel {
 public:
  using Variant = ConvVariant;
  static constexpr Variant kVariants[] = {{"SparseInt8Conv", ORT_UINT8, 0},
                                          {"SparseInt8ConvSigned", ORT_INT8, -128}};
  static OrtElementType input_type(const Variant&, size_t i) {
    if (i == 0) return ORT_UNDEFINED;  // of two types, which the kernel tells apart
    return i > std::size(int8_quads::kParts) ? ORT_INT32 : int8_quads::kParts[i - 1].type;
  }
  static size_t input_count(const Variant&) { return std::size(int8_quads::kParts) + 2; }
  static OrtElementType output_type(const Variant& variant) { return variant.output; }
  static size_t output_count(const Variant&) { return 1; }
  static void infer_shape(const OrtApi& api, const Variant& variant, OrtShapeInferContext* context);

  Kernel(const Variant& variant, const NodeReader& node);
  void compute(OrtKernelContext* context) const;

 private:
  void read_steps(const Variant& variant, const NodeReader& node);

  const OrtApi& api_;
  const std::string where_;
  const Features features_;
  mutable ThreadCount threads_;
  int8_quads::CheckedWeight checked_;
  std::vector<float> factors_;
  quads::ByteSteps steps_;
  bool is_signed_;  // X
  size_t axes_;
  spconv::Axis rows_, columns_;
  size_t group_, channels_;
};

int64_t read_within(const NodeReader& node, const char* name, int64_t low, int64_t high) {
  const int64_t found = node.integer(name);
  if (found < low || found > high) {
    node.fail(std::string("attribute ") + name + " is " + std::to_string(found) + ", expected " +
              std::to_string(low) + ".." + std::to_string(high));
  }
  return found;
}

Kernel::Kernel(const Variant& variant, const NodeReader& node)
    : api_(node.api()), where_(node.where()), features_(node.features()) {
  node.expect("format", int8_quads::kFormat);
  const Window window = Window::read("", node);
  axes_ = window.axes();
  rows_ = window.rows();
  columns_ = window.columns();
  std::vector<RawArray> arrays;
  const auto input = [&](size_t place, const char* name, OrtElementType type) {
    const NodeReader::Constant found = node.constant(place, name, type);
    return RawArray{found.data, found.count};
  };
  for (const Part& part : int8_quads::kParts) {
    arrays.push_back(input(arrays.size() + 1, part.name, part.type));
  }
  const RawArray bias = input(arrays.size() + 1, "bias", ORT_INT32);
  int64_t sizes[std::size(int8_quads::kSizes)];
  for (size_t i = 0; i < std::size(sizes); ++i) sizes[i] = node.integer(int8_quads::kSizes[i]);
  std::string problem = int8_quads::check({sizes, arrays, bias}, quads::Activation::none, checked_);
  if (!problem.empty()) node.fail(problem);
  const quads::Weight& weight = checked_.weight;
  group_ = read_group(node, weight.N, weight.block);
  channels_ = size_of(read_within(node, "channels", 1, static_cast<int64_t>(weight.K)));
  read_steps(variant, node);
  problem = quadconv::check({weight, rows_, columns_, group_, channels_, is_signed_, steps_});
  if (!problem.empty()) node.fail(problem);
  node.log(std::string("kernel ") + quads::select_kernel(features_, weight, SIZE_MAX).name);
}

void Kernel::read_steps(const Variant& variant, const NodeReader& node) {
  const quads::Weight& weight = checked_.weight;
  const int64_t x_lowest = node.integer("x_lowest");
  if (x_lowest != 0 && x_lowest != -128) node.fail("attribute x_lowest is neither 0 nor -128");
  is_signed_ = x_lowest != 0;
  const int64_t x_zero = read_within(node, "x_zero_point", x_lowest, x_lowest + 255);
  const int64_t y_highest = variant.lowest + 255;
  const int64_t y_zero = read_within(node, "y_zero_point", variant.lowest, y_highest);
  const int64_t low = read_within(node, "y_low", variant.lowest, y_highest);
  const int64_t high = read_within(node, "y_high", low, y_highest);
  const float x_scale = node.number("x_scale"), y_scale = node.number("y_scale");
  for (size_t n = 0; n < weight.N; ++n) {
    float scale;
    std::memcpy(&scale, weight.scales + n * sizeof(scale), sizeof(scale));
    factors_.push_back(x_scale * scale / y_scale);
    if (!(factors_[n] > 0 && factors_[n] < std::numeric_limits<float>::infinity())) {
      node.fail("x_scale times scales[" + std::to_string(n) + "] by y_scale is no finite number above 0");
    }
  }
  steps_ = {static_cast<int32_t>(x_zero - x_lowest), factors_.data(), static_cast<int32_t>(y_zero),
            static_cast<float>(low - y_zero), static_cast<float>(high - y_zero)};
}

void Kernel::compute(OrtKernelContext* context) const {
  const quadconv::Convolution conv{checked_.weight, rows_, columns_, group_, channels_, is_signed_, steps_};
  const auto images = images_of(byte_input(api_, context, where_, 0, "X"), where_, group_ * channels_, axes_);
  const auto& [x, batch, height, width] = images;
  if (x.is_signed != is_signed_) {
    throw InvalidError{where_ + ": input X is " + (x.is_signed ? "int8" : "uint8") +
                       ", unlike attribute x_lowest"};
  }
  const auto [out_height, out_width] = output_sizes(images, where_, rows_, columns_);
  unsigned char* y =
      byte_output(api_, context, 0, images_dims(axes_, batch, conv.weight.N, out_height, out_width));
  if (batch == 0) return;
  const quadconv::Plan plan =
      quadconv::make_plan(conv, batch, height, width, features_, threads_.expected());
  const Scratch scratch(api_, context, x.value, plan.scratch_bytes);
  SessionWorkers workers(api_, context, &threads_);
  if (!quadconv::run(plan, conv, x.data, y, scratch.get(), workers)) check_status(workers.status());
}

void Kernel::infer_shape(const OrtApi& api, const Variant& variant, OrtShapeInferContext* context) {
  SymbolicShape shape;
  if (!input_shape(api, context, 0, shape)) return;
  const Window window =
      Window::read("", [&](const char* name) { return integers_attribute(api, context, name); });
  // Refused when the kernel is created, or when it runs.
  if (!window.problem().empty() || shape.dims.size() != 2 + window.axes()) return;
  window.infer(shape, integer_attribute(api, context, "N"));
  set_output_shape(api, context, 0, shape, variant.output);
}

}  // namespace

std::vector<const OrtCustomOp*> int8_conv_ops(const OrtApi& api) { return make_ops<Kernel>(api); }

}  // namespace sparse_ops
