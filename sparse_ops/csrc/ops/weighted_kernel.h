// What the kernels of all operators with stored weights share: reading and checking these in their format
// when a node is created, choosing the kernels for them, and running a plan on the session's threads.
#pragma once

#include <array>
#include <iterator>
#include <span>
#include <string>

#include "formats/chunked_csc.h"
#include "formats/linears.h"
#include "kernels/spmm/spmm.h"
#include "ops/op_support.h"

namespace sparse_ops {

// The inputs of one weight: its parts and its bias.
constexpr size_t kWeightInputs = std::size(chunked_csc::kParts) + 1;

// The base of such a kernel, with `kWeights` weights right behind the activations X. What an operator has
// beside them it says itself: attributes, further inputs and outputs, and what it computes.
template <size_t kWeights = 1>
class WeightedKernel {
 public:
  // With further inputs float32 and one output, unless the operator says otherwise.
  static OrtElementType input_type(const auto& /*variant*/, size_t i) {
    if (i == 0 || i >= kBehindWeights) return ORT_FLOAT;
    const size_t part = (i - 1) % kWeightInputs;
    return part < std::size(chunked_csc::kParts) ? chunked_csc::kParts[part].type : ORT_FLOAT;
  }
  static size_t input_count(const auto& /*variant*/) { return kBehindWeights; }
  static size_t output_count(const auto& /*variant*/) { return 1; }

 protected:
  // The first input behind the weights.
  static constexpr size_t kBehindWeights = 1 + kWeights * kWeightInputs;

  explicit WeightedKernel(const NodeReader& node)
      : api_(node.api()), where_(node.where()), features_(node.features()) {}

  const spmm::Weight& weight(size_t index = 0) const { return weights_[index].weight; }

  // Read the weight `index` and check every rule of its format; it stays where it is. Names of a node's
  // second weight have a `prefix`. With `linears` outputs of zeros may lie between them, and these are the
  // outputs of each.
  void read_tensors(const NodeReader& node, spmm::Activation activation,
                    std::span<const int64_t> linears = {}, size_t index = 0, const std::string& prefix = "") {
    int64_t sizes[std::size(chunked_csc::kSizes)];
    RawArray parts[std::size(chunked_csc::kParts)];
    const auto input = [&](size_t part, const Part& is) {
      const size_t place = 1 + index * kWeightInputs + part;
      const NodeReader::Constant found = node.constant(place, (prefix + is.name).c_str(), is.type);
      return RawArray{found.data, found.count};
    };
    for (size_t i = 0; i < std::size(parts); ++i) parts[i] = input(i, chunked_csc::kParts[i]);
    const RawArray bias = input(std::size(parts), {"bias", ORT_FLOAT});
    for (size_t i = 0; i < std::size(sizes); ++i) {
      sizes[i] = node.integer((prefix + chunked_csc::kSizes[i]).c_str());
    }
    const std::string problem =
        chunked_csc::check(RawWeight{sizes, parts, bias, linears}, activation, weights_[index]);
    if (!problem.empty()) node.fail(prefix.empty() ? problem : "weight " + prefix + "*: " + problem);
  }

  // The same of a weight of one linear, in a format for such.
  void read_weight(const NodeReader& node, spmm::Activation activation = spmm::Activation::none,
                   size_t index = 0, const std::string& prefix = "") {
    node.expect("format", chunked_csc::kFormat);
    read_tensors(node, activation, {}, index, prefix);
  }

  // The first weight, of several linears side by side, `split` outputs each; `name` is what says so.
  void read_split_weight(const NodeReader& node, spmm::Activation activation, const std::string& name,
                         std::span<const int64_t> split) {
    if (node.one_of("format", {chunked_csc::kFormat, chunked_csc::kPartsFormat}) == 1) {
      return read_tensors(node, activation, split);
    }
    read_tensors(node, activation);
    const std::string expected = check_whole_blocks(weight().N, weight().block, split);
    if (!expected.empty()) node.fail("attribute " + name + ", expected " + expected);
  }

  // The first weight, and how many outputs its product has: if `gated`, it is a gate and an up projection
  // side by side.
  int64_t read_activated_weight(const NodeReader& node, spmm::Activation activation, bool gated) {
    if (!gated) {
      read_weight(node, activation);
      return static_cast<int64_t>(weight().N);
    }
    const int64_t N = node.integer("N");
    if (N < 2 || N % 2 != 0) {
      node.fail("attribute N is " + std::to_string(N) + ", expected two equal halves");
    }
    const std::array<int64_t, 2> halves = {N / 2, N / 2};
    read_split_weight(node, activation, "N is " + std::to_string(N), halves);
    weights_[0].weight.gated = true;
    return halves[0];
  }

  // What multiplies that many rows by a weight.
  std::string kernel_name(size_t index = 0, size_t rows = SIZE_MAX) const {
    return spmm::select_kernel(features_, weight(index), rows).name;
  }

  // Input X [..., K].
  InputTensor rows_input(const OrtKernelContext* context) const {
    return sparse_ops::rows_input(api_, context, where_, weight().K);
  }

  // The threads to cut the tasks of a plan for.
  size_t threads() const { return threads_.expected(); }

  // run(scratch, workers) on the session's threads, with memory of that many bytes on the device of `x`; it
  // returns false if they failed.
  template <class Run>
  void run_planned(const OrtKernelContext* context, const InputTensor& x, size_t scratch_bytes,
                   Run run) const {
    const Scratch scratch(api_, context, x.value, scratch_bytes);
    SessionWorkers workers(api_, context, &threads_);
    if (!run(scratch.get(), workers)) check_status(workers.status());
  }

  const OrtApi& api_;
  const std::string where_;
  const Features features_;

 private:
  mutable ThreadCount threads_;
  chunked_csc::CheckedWeight weights_[kWeights];
};

}  // namespace sparse_ops
