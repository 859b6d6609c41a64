// The operators SkipLayerNormalization* and SkipRMSNormalization*; contract in sparse_ops/ops/skip_layer_norm.py.

#include "ops/operators.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "kernels/normalization/normalization.h"
#include "ops/op_set.h"
#include "ops/op_support.h"

namespace sparse_ops {
namespace {

enum Input : size_t { kX, kSkip, kGamma, kBeta };
enum Output : size_t { kY, kSum };

// What the name of an operator says.
struct NormVariant {
  const char* name;
  bool has_beta, has_sum;
};

using Dims = std::vector<int64_t>;

// Size of an axis counted from the last; 1 in front of the first.
int64_t axis_from_end(const Dims& dims, size_t axis) {
  return axis < dims.size() ? dims[dims.size() - 1 - axis] : 1;
}

// The shape that two broadcast to; empty if they do not fit.
Dims broadcast(const Dims& a, const Dims& b) {
  Dims dims(std::max(a.size(), b.size()));
  for (size_t axis = 0; axis < dims.size(); ++axis) {
    const int64_t m = axis_from_end(a, axis), n = axis_from_end(b, axis);
    if (m != n && m != 1 && n != 1) return {};
    dims[dims.size() - 1 - axis] = m == 1 ? n : m;
  }
  return dims;
}

// Whether `part` is as `whole` but for leading axes, which it lacks or has with size 1.
bool repeats(const Dims& part, const Dims& whole) {
  if (part.empty() || part.size() > whole.size() || part.back() != whole.back()) return false;
  size_t axis = 0;
  while (axis < part.size() && axis_from_end(part, axis) == axis_from_end(whole, axis)) ++axis;
  for (; axis < part.size(); ++axis) {
    if (axis_from_end(part, axis) != 1) return false;
  }
  return true;
}

// Where the last axis of a broadcast operand lies for one row of the result, and its step along that axis.
struct BroadcastRow {
  const float* data;
  size_t step;
};
BroadcastRow broadcast_row(const InputTensor& tensor, const Dims& dims, size_t row) {
  size_t offset = 0, stride = 1;
  for (size_t axis = 0; axis < tensor.dims.size(); ++axis) {
    const size_t own = static_cast<size_t>(axis_from_end(tensor.dims, axis));
    if (axis > 0) {
      const size_t size = static_cast<size_t>(axis_from_end(dims, axis));
      if (own != 1) offset += row % size * stride;
      row /= size;
    }
    stride *= own;
  }
  return {tensor.data + offset, tensor.dims.empty() || tensor.dims.back() == 1 ? size_t{0} : size_t{1}};
}

void add_broadcast(const InputTensor& x, const InputTensor& skip, const Dims& dims, size_t rows,
                   size_t channels, float* sum) {
  for (size_t row = 0; row < rows; ++row, sum += channels) {
    const BroadcastRow a = broadcast_row(x, dims, row), b = broadcast_row(skip, dims, row);
    for (size_t c = 0; c < channels; ++c) sum[c] = a.data[c * a.step] + b.data[c * b.step];
  }
}

class Kernel {
 public:
  using Variant = NormVariant;
  static constexpr Variant kVariants[] = {{"SkipLayerNormalization", true, false},
                                          {"SkipLayerNormalizationSum", true, true},
                                          {"SkipRMSNormalization", false, false},
                                          {"SkipRMSNormalizationSum", false, true}};
  static OrtElementType input_type(const Variant&, size_t) { return ORT_FLOAT; }
  static size_t input_count(const Variant& variant) { return size_t{kGamma} + 1 + variant.has_beta; }
  static size_t output_count(const Variant& variant) { return size_t{kY} + 1 + variant.has_sum; }
  static void infer_shape(const OrtApi& api, const Variant& variant, OrtShapeInferContext* context);

  Kernel(const Variant& variant, const NodeReader& node);
  void compute(OrtKernelContext* context) const;

 private:
  const float* vector(OrtKernelContext* context, Input index, const char* name, size_t channels) const;

  const Variant& variant_;
  const OrtApi& api_;
  std::string where_;
  float epsilon_;
  const normalization::Kernel* kernel_;
};

Kernel::Kernel(const Variant& variant, const NodeReader& node) : variant_(variant), api_(node.api()) {
  where_ = node.where();
  epsilon_ = node.number("epsilon");
  if (!(epsilon_ >= 0) || std::isinf(epsilon_)) {
    node.fail("attribute epsilon is " + std::to_string(epsilon_) + ", expected a number of at least 0");
  }
  kernel_ = &normalization::select_kernel(node.features());
  node.log(std::string("kernel ") + kernel_->name);
}

const float* Kernel::vector(OrtKernelContext* context, Input index, const char* name, size_t channels) const {
  const InputTensor tensor = float_input(api_, context, index);
  if (tensor.dims != Dims{static_cast<int64_t>(channels)}) {
    throw InvalidError{where_ + ": input " + name + " has shape " + text_of(tensor.dims) + ", expected [" +
                       std::to_string(channels) + "]"};
  }
  return tensor.data;
}

void Kernel::compute(OrtKernelContext* context) const {
  InputTensor x = float_input(api_, context, kX), skip = float_input(api_, context, kSkip);
  const Dims dims = broadcast(x.dims, skip.dims);
  if (dims.empty()) {
    throw InvalidError{where_ + ": inputs X and skip have shapes " + text_of(x.dims) + " and " +
                       text_of(skip.dims) + ", which cannot be added to rows of channels"};
  }
  float* y = float_output(api_, context, kY, dims);
  float* sum = variant_.has_sum ? float_output(api_, context, kSum, dims) : nullptr;

  normalization::Arguments arguments{};
  arguments.y = y;
  arguments.sum = sum;
  arguments.channels = static_cast<size_t>(dims.back());
  arguments.rows = 1;
  for (size_t axis = 0; axis + 1 < dims.size(); ++axis) arguments.rows *= static_cast<size_t>(dims[axis]);
  arguments.epsilon = epsilon_;
  arguments.gamma = vector(context, kGamma, "gamma", arguments.channels);
  arguments.beta = variant_.has_beta ? vector(context, kBeta, "beta", arguments.channels) : nullptr;
  if (!repeats(skip.dims, x.dims)) std::swap(x, skip);
  arguments.x = x.data;
  arguments.skip = skip.data;
  if (repeats(skip.dims, x.dims)) {
    arguments.skip_rows = skip.elements / std::max<size_t>(1, arguments.channels);
  } else if (arguments.rows > 0) {  // rare: the sum first, then its normalization
    float* to = sum != nullptr ? sum : y;
    add_broadcast(x, skip, dims, arguments.rows, arguments.channels, to);
    arguments.x = to;
    arguments.skip = nullptr;
  }
  SessionWorkers workers(api_, context);
  if (!normalization::run(*kernel_, arguments, workers)) check_status(workers.status());
}

// What is known of the shape of x + skip.
void Kernel::infer_shape(const OrtApi& api, const Variant& variant, OrtShapeInferContext* context) {
  SymbolicShape x, skip;
  if (!input_shape(api, context, kX, x) || !input_shape(api, context, kSkip, skip)) return;
  if (x.dims.size() < skip.dims.size()) std::swap(x, skip);
  const size_t shift = x.dims.size() - skip.dims.size();
  for (size_t axis = 0; axis < skip.dims.size(); ++axis) {
    int64_t& size = x.dims[shift + axis];
    std::string& name = x.names[shift + axis];
    const int64_t other = skip.dims[axis];
    if (size == 1 || (size < 0 && other > 1)) {
      size = other;
      name = skip.names[axis];
    } else if (size < 0 && other < 0 && name != skip.names[axis]) {
      name.clear();
    }
  }
  set_output_shape(api, context, kY, x);
  if (variant.has_sum) set_output_shape(api, context, kSum, x);
}

}  // namespace

std::vector<const OrtCustomOp*> skip_layer_norm_ops(const OrtApi& api) { return make_ops<Kernel>(api); }

}  // namespace sparse_ops
