#include "ops/attention.h"

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
  bool split, masked;  // k and v are [B, H, Sk, D]; there is a mask
};

using Dims = std::vector<int64_t>;

class Kernel {
 public:
  using Variant = AttentionVariant;
  static constexpr Variant kVariants[] = {{"Attention", false, false},
                                          {"AttentionMasked", false, true},
                                          {"AttentionSplit", true, false},
                                          {"AttentionSplitMasked", true, true}};
  static OrtElementType input_type(const Variant&, size_t) { return ORT_FLOAT; }
  static size_t input_count(const Variant& variant) { return size_t{kV} + 1 + variant.masked; }
  static size_t output_count(const Variant&) { return 1; }
  static void infer_shape(const OrtApi& api, const Variant& variant, OrtShapeInferContext* context);

  Kernel(const Variant& variant, const OrtApi& api, const OrtKernelInfo* info);
  void compute(OrtKernelContext* context) const;

 private:
  // One operand; a single batch is repeated.
  struct Heads {
    attention::Operand operand;
    size_t batches, rows, size;
  };
  Heads merged(const InputTensor& tensor, const char* name) const;
  Heads split(const InputTensor& tensor, const char* name) const;
  attention::Mask mask(OrtKernelContext* context, const attention::Arguments& arguments) const;
  [[noreturn]] void fail(const std::string& what) const { throw InvalidError{where_ + ": " + what}; }

  const Variant& variant_;
  const OrtApi& api_;
  std::string where_;
  size_t heads_ = 0;
  float scale_;
  const attention::Kernel* kernel_;
};

Kernel::Kernel(const Variant& variant, const OrtApi& api, const OrtKernelInfo* info)
    : variant_(variant), api_(api) {
  const NodeReader node(api, info, variant.name);
  where_ = node.where();
  const int64_t heads = node.integer("num_heads");
  if (heads < 1) node.fail("attribute num_heads is " + std::to_string(heads) + ", expected at least 1");
  heads_ = static_cast<size_t>(heads);
  scale_ = node.number("scale");
  if (!std::isfinite(scale_))
    node.fail("attribute scale is " + std::to_string(scale_) + ", expected a finite number");
  kernel_ = &attention::select_kernel(node.isa());
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

attention::Mask Kernel::mask(OrtKernelContext* context, const attention::Arguments& a) const {
  const InputTensor tensor = float_input(api_, context, kMask);
  const size_t full[4] = {a.batches, a.heads, a.queries, a.keys}, rank = tensor.dims.size();
  size_t steps[4] = {}, step = 1;
  bool fits = rank <= 4;
  for (size_t axis = 4; axis-- > 4 - rank && fits;) {
    const auto size = static_cast<size_t>(tensor.dims[axis + rank - 4]);
    fits = size == 1 || size == full[axis];
    if (size != 1) steps[axis] = step;
    step *= size;
  }
  if (!fits) {
    Dims dims(4);
    for (size_t axis = 0; axis < 4; ++axis) dims[axis] = static_cast<int64_t>(full[axis]);
    fail("input mask has shape " + text_of(tensor.dims) + ", which does not broadcast to " + text_of(dims));
  }
  return {tensor.data, steps[0], steps[1], steps[2], steps[3]};
}

void Kernel::compute(OrtKernelContext* context) const {
  const InputTensor query = float_input(api_, context, kQ), key = float_input(api_, context, kK),
                    value = float_input(api_, context, kV);
  const Heads q = merged(query, "q"), k = variant_.split ? split(key, "k") : merged(key, "k"),
              v = variant_.split ? split(value, "v") : merged(value, "v");
  const auto serves = [&](const Heads& x) { return x.batches == q.batches || x.batches == 1; };
  if (!serves(k) || !serves(v) || k.size != q.size || v.rows != k.rows) {
    fail("inputs q, k and v have shapes " + text_of(query.dims) + ", " + text_of(key.dims) + " and " +
         text_of(value.dims) + ", which do not fit");
  }
  attention::Arguments arguments{};
  arguments.q = q.operand;
  arguments.k = k.operand;
  arguments.v = v.operand;
  arguments.batches = q.batches;
  arguments.heads = heads_;
  arguments.queries = q.rows;
  arguments.keys = k.rows;
  arguments.size = q.size;
  arguments.value_size = v.size;
  arguments.scale = scale_;
  if (variant_.masked) arguments.mask = mask(context, arguments);
  arguments.y =
      float_output(api_, context, 0, {query.dims[0], query.dims[1], static_cast<int64_t>(heads_ * v.size)});
  if (q.batches * q.rows * v.size == 0) return;

  const Scratch scratch(api_, context, query.value, attention::scratch_bytes(*kernel_, arguments));
  SessionWorkers workers(api_, context);
  if (!attention::run(*kernel_, arguments, scratch.get(), workers)) check_status(workers.status());
}

// [B, Sq, H * D]: B and Sq as in q, the channels as in v
void Kernel::infer_shape(const OrtApi& api, const Variant& variant, OrtShapeInferContext* context) {
  SymbolicShape q, v;
  if (!input_shape(api, context, kQ, q) || q.dims.size() != 3) return;
  q.dims[2] = -1;
  q.names[2] = "";
  if (input_shape(api, context, kV, v) && v.dims.size() == (variant.split ? 4 : 3)) {
    const int64_t heads = variant.split ? integer_attribute(api, context, "num_heads") : 1;
    if (v.dims.back() >= 0) q.dims[2] = heads * v.dims.back();
    if (!variant.split) q.names[2] = v.names[2];
  }
  set_output_shape(api, context, 0, q);
}

}  // namespace

std::vector<const OrtCustomOp*> attention_ops(const OrtApi& api) { return make_ops<Kernel>(api); }

}  // namespace sparse_ops
