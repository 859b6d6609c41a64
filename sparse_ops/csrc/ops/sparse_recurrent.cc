// The operators SparseLSTM* and SparseGRU*; contract in sparse_ops/ops/sparse_recurrent.py.

#include "ops/operators.h"

#include <algorithm>
#include <string>

#include "kernels/recurrent/recurrent.h"
#include "kernels/sizes.h"
#include "ops/op_set.h"
#include "ops/op_support.h"
#include "ops/weighted_kernel.h"

namespace sparse_ops {
namespace {

using recurrent::Cell;

// What the name of an operator says: which inputs it has behind the weights.
struct RecurrentVariant {
  const char* name;
  bool is_lstm;
  bool has_lengths = false;
  bool has_state = false;

  size_t states() const { return is_lstm ? 2 : 1; }  // h, and c of an LSTM
};

class Kernel : public WeightedKernel<2> {
 public:
  using Variant = RecurrentVariant;
  static constexpr Variant kVariants[] = {{"SparseLSTM", true},
                                          {"SparseLSTMLengths", true, true},
                                          {"SparseLSTMState", true, false, true},
                                          {"SparseLSTMLengthsState", true, true, true},
                                          {"SparseGRU", false},
                                          {"SparseGRULengths", false, true},
                                          {"SparseGRUState", false, false, true},
                                          {"SparseGRULengthsState", false, true, true}};
  static OrtElementType input_type(const Variant& variant, size_t i) {
    return i == kLengths && variant.has_lengths ? ORT_INT32 : WeightedKernel::input_type(variant, i);
  }
  static size_t input_count(const Variant& variant) {
    return kLengths + variant.has_lengths + (variant.has_state ? variant.states() : 0);
  }
  static size_t output_count(const Variant& variant) { return 1 + variant.states(); }
  static void infer_shape(const OrtApi& api, const Variant&, OrtShapeInferContext* context);

  Kernel(const Variant& variant, const NodeReader& node);
  void compute(OrtKernelContext* context) const;

 private:
  static constexpr size_t kLengths = kBehindWeights;

  const int32_t* read_lengths(const OrtKernelContext* context, const std::vector<int64_t>& x) const;
  float* read_state(OrtKernelContext* context, size_t state, const std::vector<int64_t>& dims) const;

  const Variant& variant_;
  Cell cell_;
  bool reverse_;
  size_t directions_;
};

Kernel::Kernel(const Variant& variant, const NodeReader& node) : WeightedKernel(node), variant_(variant) {
  cell_ = Cell::lstm;
  if (!variant.is_lstm) {
    const int64_t behind = node.integer("linear_before_reset");
    if (behind != 0 && behind != 1) {
      node.fail("attribute linear_before_reset is " + std::to_string(behind) + ", expected 0 or 1");
    }
    cell_ = behind ? Cell::gru : Cell::gru_reset_first;
  }
  const std::string direction = node.text("direction");
  if (direction != "forward" && direction != "reverse" && direction != "bidirectional") {
    node.fail("attribute direction is '" + direction + "', expected forward, reverse or bidirectional");
  }
  reverse_ = direction == "reverse";
  directions_ = direction == "bidirectional" ? 2 : 1;
  read_weight(node);
  read_weight(node, spmm::Activation::none, 1, "recurrent_");
  const spmm::Weight &input = weight(0), &recurrent = weight(1);
  size_t outputs;
  if (__builtin_mul_overflow(recurrent.K, directions_ * recurrent::gates(cell_), &outputs) ||
      recurrent.N != outputs || input.N != outputs) {
    node.fail("attributes N and recurrent_N are " + std::to_string(input.N) + " and " +
              std::to_string(recurrent.N) + ", expected recurrent_K = " + std::to_string(recurrent.K) +
              " for each of " + std::to_string(recurrent::gates(cell_)) + " gates and " +
              std::to_string(directions_) + " directions");
  }
  node.log("kernel " + kernel_name() + " and " + kernel_name(1, 1));
}

// sequence_lens, one for each row of the batch; `x` is the shape of X.
const int32_t* Kernel::read_lengths(const OrtKernelContext* context, const std::vector<int64_t>& x) const {
  if (!variant_.has_lengths) return nullptr;
  const IntegerTensor lengths = integer_input(api_, context, kLengths);
  if (lengths.dims != std::vector<int64_t>{x[1]}) {
    throw InvalidError{where_ + ": input sequence_lens has shape " + text_of(lengths.dims) + ", expected [" +
                       std::to_string(x[1]) + "]"};
  }
  for (int64_t row = 0; row < x[1]; ++row) {
    if (lengths.data[row] >= 0 && lengths.data[row] <= x[0]) continue;
    throw InvalidError{where_ + ": input sequence_lens has " + std::to_string(lengths.data[row]) +
                       " at place " + std::to_string(row) + ", expected 0.." + std::to_string(x[0])};
  }
  return lengths.data;
}

// The output h (`state` 0) or c of shape `dims`, filled with what it is before the first step.
float* Kernel::read_state(OrtKernelContext* context, size_t state, const std::vector<int64_t>& dims) const {
  float* to = float_output(api_, context, 1 + state, dims);
  const auto size = static_cast<size_t>(dims[0] * dims[1] * dims[2]);
  if (!variant_.has_state) {
    std::fill_n(to, size, 0.0f);
    return to;
  }
  const InputTensor initial = float_input(api_, context, kLengths + variant_.has_lengths + state);
  if (initial.dims != dims) {
    throw InvalidError{where_ + ": input " + (state == 0 ? "initial_h" : "initial_c") + " has shape " +
                       text_of(initial.dims) + ", expected " + text_of(dims)};
  }
  std::copy_n(initial.data, size, to);
  return to;
}

void Kernel::compute(OrtKernelContext* context) const {
  const spmm::Weight &input = weight(0), &recurrent = weight(1);
  const InputTensor x = rows_input(context);
  if (x.dims.size() != 3) {
    throw InvalidError{where_ + ": input X has shape " + text_of(x.dims) + ", expected [steps, batch, " +
                       std::to_string(input.K) + "]"};
  }
  const int64_t steps = x.dims[0], batch = x.dims[1], hidden = static_cast<int64_t>(recurrent.K),
                directions = static_cast<int64_t>(directions_);
  recurrent::Problem problem{};
  problem.cell = cell_;
  problem.reverse = reverse_;
  problem.steps = static_cast<size_t>(steps);
  problem.batch = static_cast<size_t>(batch);
  problem.directions = directions_;
  problem.hidden = recurrent.K;
  problem.weight = &recurrent;
  problem.lengths = read_lengths(context, x.dims);
  problem.y = float_output(api_, context, 0, {steps, directions, batch, hidden});
  problem.h = read_state(context, 0, {directions, batch, hidden});
  if (variant_.is_lstm) problem.c = read_state(context, 1, {directions, batch, hidden});
  if (batch == 0) return;

  const int32_t* lengths = problem.lengths;
  const size_t rows =
      problem.batch * (lengths == nullptr
                           ? problem.steps
                           : static_cast<size_t>(*std::max_element(lengths, lengths + problem.batch)));
  const size_t expected = threads();
  const spmm::Plan products = spmm::make_plan(input, rows, features_, expected);
  const recurrent::Plan plan = recurrent::make_plan(problem, features_, expected);
  size_t size, bytes;
  if (__builtin_mul_overflow(rows, input.N, &size) || __builtin_mul_overflow(size, sizeof(float), &bytes)) {
    throw InvalidError{where_ + ": input X of shape " + text_of(x.dims) + " is too large"};
  }
  bytes = round_up(bytes, kCacheLine);
  const size_t scratch_bytes = bytes + std::max(products.scratch_bytes, plan.scratch_bytes);
  run_planned(context, x, scratch_bytes, [&](void* scratch, Workers& workers) {
    float* projected = static_cast<float*>(scratch);
    void* rest = static_cast<char*>(scratch) + bytes;
    problem.x = projected;
    return (rows == 0 || spmm::run(products, input, x.data, projected, rest, workers)) &&
           recurrent::run(plan, problem, rest, workers);
  });
}

void Kernel::infer_shape(const OrtApi& api, const Variant& variant, OrtShapeInferContext* context) {
  SymbolicShape x;
  if (!input_shape(api, context, 0, x) || x.dims.size() != 3) return;
  const int64_t hidden = integer_attribute(api, context, "recurrent_K");
  const int64_t outputs = integer_attribute(api, context, "recurrent_N");
  if (hidden < 1) return;  // refused when the kernel is created
  const int64_t directions = outputs / hidden / (variant.is_lstm ? 4 : 3);
  set_output_shape(api, context, 0,
                   {{x.dims[0], directions, x.dims[1], hidden}, {x.names[0], "", x.names[1], ""}});
  for (size_t state = 0; state < variant.states(); ++state) {
    set_output_shape(api, context, 1 + state, {{directions, x.dims[1], hidden}, {"", x.names[1], ""}});
  }
}

}  // namespace

std::vector<const OrtCustomOp*> sparse_recurrent_ops(const OrtApi& api) { return make_ops<Kernel>(api); }

}  // namespace sparse_ops
