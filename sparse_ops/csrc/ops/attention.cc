// The operators Attention, AttentionSplit and AttentionHeads, each without a mask, with one, and with one where
// weights that are NaN become 0; contract in sparse_ops/ops/attention.py.

#include "ops/operators.h"

#include <cmath>
#include <string>
#include <vector>

#include "kernels/attention/attention.h"
#include "ops/op_set.h"
#include "ops/op_support.h"

namespace sparse_ops {
namespace {

enum Input : size_t { kQ, kK, kV, kMask };

// What the name of an operator says.
struct AttentionVariant {
  const char* name;
  bool split, masked, heads;  // k and v are [B, H, Sk, D]; there is a mask; q is [B, H, Sq, D], too
  bool nan_to_zero;           // a weight that is NaN becomes 0
};

using Dims = std::vector<int64_t>;

class Kernel {
 public:
  using Variant = AttentionVariant;
  static constexpr Variant kVariants[] = {{"Attention", false, false, false, false},
                                          {"AttentionMasked", false, true, false, false},
                                          {"AttentionMaskedNanToZero", false, true, false, true},
                                          {"AttentionSplit", true, false, false, false},
                                          {"AttentionSplitMasked", true, true, false, false},
                                          {"AttentionSplitMaskedNanToZero", true, true, false, true},
                                          {"AttentionHeads", true, false, true, false},
                                          {"AttentionHeadsMasked", true, true, true, false},
                                          {"AttentionHeadsMaskedNanToZero", true, true, true, true}};
  static OrtElementType input_type(const Variant&, size_t) { return ORT_FLOAT; }
  static size_t input_count(const Variant& variant) { return size_t{kV} + 1 + variant.masked; }
  static size_t output_count(const Variant&) { return 1; }
  static void infer_shape(const OrtApi& api, const Variant& variant, OrtShapeInferContext* context);

  Kernel(const Variant& variant, const NodeReader& node);
  void compute(OrtKernelContext* context) const;

 private:
  // One operand; a single batch is repeated.
  struct Heads {
    attention::Operand operand;
    size_t batches, rows, size;
  };
  // The mask's axes [batch, head, query, key]; those that it lacks have size 1. No mask: all are 1.
  struct MaskInput {
    InputTensor tensor{};
    size_t sizes[4] = {1, 1, 1, 1};
  };
  Heads merged(const InputTensor& tensor, const char* name) const;
  Heads split(const InputTensor& tensor, const char* name) const;
  MaskInput mask_input(OrtKernelContext* context) const;
  attention::Mask mask(const MaskInput& input, const attention::Arguments& arguments) const;
  [[noreturn]] void fail(const std::string& what) const { throw InvalidError{where_ + ": " + what}; }

  const Variant& variant_;
  const OrtApi& api_;
  std::string where_;
  size_t heads_ = 0;
  float scale_;
  const attention::Kernel* kernel_;
};

// The size of what is broadcast from `size` and `other`; false if they do not fit.
bool widen(size_t& size, size_t other) {
  if (size == 1) size = other;
  return other == 1 || other == size;
}

Kernel::Kernel(const Variant& variant, const NodeReader& node) : variant_(variant), api_(node.api()) {
  where_ = node.where();
  const int64_t heads = node.integer("num_heads");
  if (heads < 1) node.fail("attribute num_heads is " + std::to_string(heads) + ", expected at least 1");
  heads_ = static_cast<size_t>(heads);
  scale_ = node.number("scale");
  if (!std::isfinite(scale_))
    node.fail("attribute scale is " + std::to_string(scale_) + ", expected a finite number");
  kernel_ = &attention::select_kernel(node.features());
  node.log(std::string("kernel ") + kernel_->name);
}

Kernel::Heads Kernel::merged(const InputTensor& tensor, const char* name) const {
  const auto heads = static_cast<int64_t>(heads_);
  if (tensor.dims.size() != 3 || tensor.dims[2] % heads != 0) {
    fail(std::string("input ") + name + " has shape " + text_of(tensor.dims) +
         ", expected [batch, sequence, channels] with channels for " + std::to_string(heads) + " heads");
  }
  const auto rows = static_cast<size_t>(tensor.dims[1]), channels = static_cast<size_t>(tensor.dims[2]);
  const size_t size = channels / heads_;
  const auto batches = static_cast<size_t>(tensor.dims[0]);
  return {{tensor.data, batches == 1 ? 0 : rows * channels, size, channels}, batches, rows, size};
}

Kernel::Heads Kernel::split(const InputTensor& tensor, const char* name) const {
  if (tensor.dims.size() != 4 || tensor.dims[1] != static_cast<int64_t>(heads_)) {
    fail(std::string("input ") + name + " has shape " + text_of(tensor.dims) + ", expected [batch, " +
         std::to_string(heads_) + ", sequence, channels]");
  }
  const auto rows = static_cast<size_t>(tensor.dims[2]), size = static_cast<size_t>(tensor.dims[3]);
  const auto batches = static_cast<size_t>(tensor.dims[0]);
  return {{tensor.data, batches == 1 ? 0 : heads_ * rows * size, rows * size, size}, batches, rows, size};
}

Kernel::MaskInput Kernel::mask_input(OrtKernelContext* context) const {
  MaskInput mask;
  if (!variant_.masked) return mask;
  mask.tensor = float_input(api_, context, kMask);
  const Dims& dims = mask.tensor.dims;
  if (dims.size() > 4) fail("input mask has shape " + text_of(dims) + ", expected at most 4 axes");
  for (size_t axis = 0; axis < dims.size(); ++axis)
    mask.sizes[4 - dims.size() + axis] = static_cast<size_t>(dims[axis]);
  return mask;
}

attention::Mask Kernel::mask(const MaskInput& input, const attention::Arguments& a) const {
  const size_t full[4] = {a.batches, a.heads, a.queries, a.keys};
  size_t steps[4] = {}, step = 1;
  bool fits = true;
  for (size_t axis = 4; axis-- > 0;) {
    const size_t size = input.sizes[axis];
    fits = fits && (size == 1 || size == full[axis]);
    if (size != 1) steps[axis] = step;
    step *= size;
  }
  if (!fits) {
    Dims dims(4);
    for (size_t axis = 0; axis < 4; ++axis) dims[axis] = static_cast<int64_t>(full[axis]);
    fail("input mask has shape " + text_of(input.tensor.dims) + ", which does not broadcast to " +
         text_of(dims));
  }
  return {input.tensor.data, steps[0], steps[1], steps[2], steps[3]};
}

void Kernel::compute(OrtKernelContext* context) const {
  const InputTensor query = float_input(api_, context, kQ), key = float_input(api_, context, kK),
                    value = float_input(api_, context, kV);
  Heads q = variant_.heads ? split(query, "q") : merged(query, "q"), k = variant_.split ? split(key, "k") : merged(key, "k");
  const Heads v = variant_.split ? split(value, "v") : merged(value, "v");
  const MaskInput given = mask_input(context);
  // Queries or keys that are one are repeated where the mask has more of them.
  size_t batches = q.batches, queries = q.rows, keys = k.rows;
  const bool fits = widen(batches, k.batches) && widen(batches, v.batches) && k.size == q.size;
  widen(batches, given.sizes[0]);
  widen(queries, given.sizes[2]);
  widen(keys, given.sizes[3]);
  if (!fits || v.rows != keys) {
    fail("inputs q, k and v have shapes " + text_of(query.dims) + ", " + text_of(key.dims) + " and " +
         text_of(value.dims) + ", which do not fit");
  }
  if (q.rows != queries) q.operand.row = 0;
  if (k.rows != keys) k.operand.row = 0;
  attention::Arguments arguments{};
  arguments.q = q.operand;
  arguments.k = k.operand;
  arguments.v = v.operand;
  arguments.batches = batches;
  arguments.heads = heads_;
  arguments.queries = queries;
  arguments.keys = keys;
  arguments.size = q.size;
  arguments.value_size = v.size;
  arguments.scale = scale_;
  arguments.nan_to_zero = variant_.nan_to_zero;
  if (variant_.masked) arguments.mask = mask(given, arguments);
  arguments.y =
      float_output(api_, context, 0, {static_cast<int64_t>(batches), static_cast<int64_t>(queries),
                                      static_cast<int64_t>(heads_ * v.size)});
  if (batches * queries * v.size == 0) return;

  const Scratch scratch(api_, context, query.value, attention::scratch_bytes(*kernel_, arguments));
  SessionWorkers workers(api_, context);
  if (!attention::run(*kernel_, arguments, scratch.get(), workers)) check_status(workers.status());
}

// What `shape` has at `axis` when it is broadcast with axis `from_end` of the input: a size that is not 1 holds for
// all, equal names are equal, all else is unknown.
void widen(SymbolicShape& shape, size_t axis, const OrtApi& api, const OrtShapeInferContext* context,
           size_t input, size_t from_end) {
  int64_t& size = shape.dims[axis];
  std::string& name = shape.names[axis];
  if (size >= 0 && size != 1) return;
  SymbolicShape other;
  const bool known = input_shape(api, context, input, other);
  if (known && other.dims.size() < from_end) return;
  const size_t place = known ? other.dims.size() - from_end : 0;
  if (known && other.dims[place] == 1) return;
  if (known && other.dims[place] >= 0) {
    size = other.dims[place];
    name = "";
  } else if (known && size == 1) {
    size = -1;
    name = other.names[place];
  } else if (!known || name != other.names[place]) {
    size = -1;
    name = "";
  }
}

// [B, Sq, H * Dv]: B and Sq as in q, unless it is repeated; the channels are those of v.
void Kernel::infer_shape(const OrtApi& api, const Variant& variant, OrtShapeInferContext* context) {
  SymbolicShape y, v;
  if (!input_shape(api, context, kQ, y) || y.dims.size() != (variant.heads ? 4 : 3)) return;
  if (variant.heads) {
    y.dims.erase(y.dims.begin() + 1);
    y.names.erase(y.names.begin() + 1);
  }
  const size_t rank = variant.split ? 4 : 3;
  widen(y, 0, api, context, kK, rank);
  widen(y, 0, api, context, kV, rank);
  if (variant.masked) {
    widen(y, 0, api, context, kMask, 4);
    widen(y, 1, api, context, kMask, 2);
  }
  y.dims[2] = -1;
  y.names[2] = "";
  if (input_shape(api, context, kV, v) && v.dims.size() == rank) {
    const int64_t heads = variant.split ? integer_attribute(api, context, "num_heads") : 1;
    if (v.dims.back() >= 0) y.dims[2] = heads * v.dims.back();
    if (!variant.split) y.names[2] = v.names[2];
  }
  set_output_shape(api, context, 0, y);
}

}  // namespace

std::vector<const OrtCustomOp*> attention_ops(const OrtApi& api) { return make_ops<Kernel>(api); }

}  // namespace sparse_ops
