#include "ops/sparse_conv.h"

#include <limits>
#include <string>
#include <vector>

#include "kernels/spconv/spconv.h"
#include "kernels/spmm/check.h"
#include "kernels/spmm/spmm.h"
#include "ops/op_set.h"
#include "ops/op_support.h"
#include "ops/stored_weight.h"

namespace sparse_ops {
namespace {

using spmm::MapEpilogue;

// What the name of an operator says.
struct ConvVariant {
  const char* name;
  bool residual;
  MapEpilogue::Activation activation;
  bool has_limits;  // of the clip, as attributes; otherwise it is ReLU
};
using enum MapEpilogue::Activation;

// Far more than any image has, and so little that sums and products of sizes cannot overflow.
constexpr int64_t kLargest = int64_t{1} << 24;

// The residual comes last.
constexpr size_t kResidual = 1 + std::size(kWeightInputs);

// Attributes of one convolution.
struct Geometry {
  spconv::Axis rows, columns;
  size_t group;
};

size_t size_of(int64_t value) { return static_cast<size_t>(value); }

// The attributes that describe the window, as the node has them.
struct Window {
  std::vector<int64_t> kernel_shape, strides, pads, dilations;

  // What is wrong with them, or "".
  std::string problem() const {
    const auto check = [](const char* name, const std::vector<int64_t>& values, size_t count, int64_t least) {
      bool good = values.size() == count;
      for (int64_t value : values) good = good && value >= least && value <= kLargest;
      return good ? ""
                  : std::string("attribute ") + name + " is " + text_of(values) + ", expected " +
                        std::to_string(count) + " numbers from " + std::to_string(least) + " to " +
                        std::to_string(kLargest);
    };
    for (const std::string& problem :
         {check("kernel_shape", kernel_shape, 2, 1), check("strides", strides, 2, 1),
          check("pads", pads, 4, 0), check("dilations", dilations, 2, 1)}) {
      if (!problem.empty()) return problem;
    }
    return "";
  }

  spconv::Axis axis(size_t i) const {
    return {size_of(kernel_shape[i]), size_of(strides[i]), size_of(pads[i]), size_of(pads[i + 2]),
            size_of(dilations[i])};
  }
};

Geometry read_geometry(const NodeReader& node) {
  const Window window = {node.integers("kernel_shape"), node.integers("strides"), node.integers("pads"),
                         node.integers("dilations")};
  if (const std::string problem = window.problem(); !problem.empty()) node.fail(problem);
  const int64_t group = node.integer("group");
  if (group < 1) node.fail("attribute group is " + std::to_string(group) + ", expected at least 1");
  return {window.axis(0), window.axis(1), size_of(group)};
}

class Kernel {
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
  static OrtElementType input_type(size_t i) {
    return i == 0 || i == kResidual ? ORT_FLOAT : kWeightInputs[i - 1].type;
  }
  static size_t input_count(const Variant& variant) { return kResidual + variant.residual; }
  static size_t output_count(const Variant&) { return 1; }
  static void infer_shape(const OrtApi& api, const Variant&, OrtShapeInferContext* context);

  Kernel(const Variant& variant, const OrtApi& api, const OrtKernelInfo* info);
  void compute(OrtKernelContext* context) const;

 private:
  const OrtApi& api_;
  std::string where_;
  Isa isa_;
  bool residual_;
  MapEpilogue epilogue_;
  Geometry geometry_;
  spmm::CheckedWeight weight_;
};

Kernel::Kernel(const Variant& variant, const OrtApi& api, const OrtKernelInfo* info)
    : api_(api),
      residual_(variant.residual),
      epilogue_{variant.activation, 0.0f, std::numeric_limits<float>::infinity()} {
  const NodeReader node(api, info, variant.name);
  where_ = node.where();
  isa_ = node.isa();
  geometry_ = read_geometry(node);
  if (variant.has_limits) {
    epilogue_.low = node.number("min");
    epilogue_.high = node.number("max");
    if (!(epilogue_.low <= epilogue_.high)) node.fail("attribute min is not at most attribute max");
  }
  read_weight(node, spmm::Activation::none, weight_);
  const spmm::Weight& weight = weight_.weight;
  const size_t taps = geometry_.rows.kernel * geometry_.columns.kernel, group = geometry_.group;
  if (weight.K % taps != 0) {
    node.fail("attribute K is " + std::to_string(weight.K) + ", no multiple of the " + std::to_string(taps) +
              " elements of kernel_shape");
  }
  if (weight.N % group != 0 || (group > 1 && weight.N / group % weight.block != 0)) {
    node.fail("attribute N is " + std::to_string(weight.N) + ", which does not make " +
              std::to_string(group) + " groups of whole blocks of " + std::to_string(weight.block));
  }
  size_t channels;
  if (__builtin_mul_overflow(weight.K / taps, group, &channels) || channels > size_t{1} << 48) {
    node.fail("attributes K and group are too large");
  }
  node.log(std::string("kernel ") + spmm::select_kernel(isa_, weight, SIZE_MAX).name);
}

void Kernel::compute(OrtKernelContext* context) const {
  const spconv::Convolution conv{weight_.weight, geometry_.rows, geometry_.columns, geometry_.group,
                                 epilogue_};
  const InputTensor x = float_input(api_, context, 0);
  const auto channels = static_cast<int64_t>(conv.channels());
  if (x.dims.size() != 4 || x.dims[1] != channels) {
    throw InvalidError{where_ + ": input X has shape " + text_of(x.dims) + ", expected [batch, " +
                       std::to_string(channels) + ", height, width]"};
  }
  const auto size = [&](size_t axis) { return size_of(x.dims[axis]); };
  const size_t out_height = spconv::output_size(conv.rows, size(2));
  const size_t out_width = spconv::output_size(conv.columns, size(3));
  if (out_height == 0 || out_width == 0) {
    throw InvalidError{where_ + ": the window of kernel_shape does not fit into input X of shape " +
                       text_of(x.dims) + " with its padding"};
  }
  const std::vector<int64_t> dims = {x.dims[0], static_cast<int64_t>(conv.weight.N),
                                     static_cast<int64_t>(out_height), static_cast<int64_t>(out_width)};
  const float* residual = nullptr;
  if (residual_) {
    const InputTensor r = float_input(api_, context, kResidual);
    if (r.dims != dims) {
      throw InvalidError{where_ + ": input R has shape " + text_of(r.dims) + ", expected " + text_of(dims) +
                         ", the shape of Y"};
    }
    residual = r.data;
  }
  float* y = float_output(api_, context, 0, dims);
  if (x.dims[0] == 0) return;

  const spconv::Plan plan = spconv::make_plan(conv, size(0), size(2), size(3), isa_);
  const Scratch scratch(api_, context, x.value, plan.scratch_bytes);
  SessionWorkers workers(api_, context);
  if (!spconv::run(plan, conv, x.data, residual, y, scratch.get(), workers)) check_status(workers.status());
}

void Kernel::infer_shape(const OrtApi& api, const Variant&, OrtShapeInferContext* context) {
  SymbolicShape shape;
  if (!input_shape(api, context, 0, shape) || shape.dims.size() != 4) return;
  const auto integers = [&](const char* name) { return integers_attribute(api, context, name); };
  const Window window = {integers("kernel_shape"), integers("strides"), integers("pads"),
                         integers("dilations")};
  if (!window.problem().empty()) return;  // refused when the kernel is created
  shape.dims[1] = integer_attribute(api, context, "N");
  for (size_t i = 0; i < 2; ++i) {
    int64_t& size = shape.dims[2 + i];
    if (size >= 0) size = static_cast<int64_t>(spconv::output_size(window.axis(i), size_of(size)));
  }
  for (size_t axis = 1; axis < 4; ++axis) shape.names[axis] = "";
  set_output_shape(api, context, 0, shape);
}

}  // namespace

std::vector<const OrtCustomOp*> sparse_conv_ops(const OrtApi& api) { return make_ops<Kernel>(api); }

}  // namespace sparse_ops
