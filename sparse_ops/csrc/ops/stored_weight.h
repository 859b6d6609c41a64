// The compressed weights of a node, read from its attributes and inputs and checked by their format.
#pragma once

#include <array>
#include <iterator>
#include <span>
#include <string>

#include "formats/chunked_csc.h"
#include "ops/op_support.h"

namespace sparse_ops {

// The inputs of one weight, right behind the activations: its parts and its bias.
constexpr size_t kWeightInputs = std::size(chunked_csc::kParts) + 1;

// Of input `i` of an operator with `weights` weights behind X; what stands behind these is float32, too.
constexpr OrtElementType weight_input_type(size_t i, size_t weights = 1) {
  if (i == 0 || i > weights * kWeightInputs) return ORT_FLOAT;
  const size_t part = (i - 1) % kWeightInputs;
  return part < std::size(chunked_csc::kParts) ? chunked_csc::kParts[part].type : ORT_FLOAT;
}

// Read and check them, from input `first` on; they stay where they are. Names of a node's second weight have
// a `prefix`. With `linears` outputs of zeros may lie between them, and these are the outputs of each.
inline void read_tensors(const NodeReader& node, spmm::Activation activation,
                         chunked_csc::CheckedWeight& weight, std::span<const int64_t> linears,
                         const std::string& prefix = "", size_t first = 1) {
  int64_t sizes[std::size(chunked_csc::kSizes)];
  RawArray parts[std::size(chunked_csc::kParts)];
  const auto input = [&](size_t index, const Part& part) {
    const NodeReader::Constant found = node.constant(first + index, (prefix + part.name).c_str(), part.type);
    return RawArray{found.data, found.count};
  };
  for (size_t i = 0; i < std::size(parts); ++i) parts[i] = input(i, chunked_csc::kParts[i]);
  const RawArray bias = input(std::size(parts), {"bias", ORT_FLOAT});
  for (size_t i = 0; i < std::size(sizes); ++i) {
    sizes[i] = node.integer((prefix + chunked_csc::kSizes[i]).c_str());
  }
  const std::string problem = chunked_csc::check(RawWeight{sizes, parts, bias, linears}, activation, weight);
  if (!problem.empty()) node.fail(prefix.empty() ? problem : "weight " + prefix + "*: " + problem);
}

// A weight of one linear.
inline void read_weight(const NodeReader& node, spmm::Activation activation,
                        chunked_csc::CheckedWeight& weight, const std::string& prefix = "",
                        size_t first = 1) {
  node.expect("format", chunked_csc::kFormat);
  read_tensors(node, activation, weight, {}, prefix, first);
}

// A weight of several linears side by side, `split` outputs each; `name` is what says so.
inline void read_weight(const NodeReader& node, spmm::Activation activation,
                        chunked_csc::CheckedWeight& weight, const std::string& name,
                        std::span<const int64_t> split) {
  if (node.one_of("format", {chunked_csc::kFormat, chunked_csc::kPartsFormat}) == 1) {
    return read_tensors(node, activation, weight, split);
  }
  read_tensors(node, activation, weight, {});
  const std::string expected = chunked_csc::check_whole_blocks(weight.weight, split);
  if (!expected.empty()) node.fail("attribute " + name + ", expected " + expected);
}

// The halves of a gated weight, gate and up projection.
inline std::array<int64_t, 2> read_halves(const NodeReader& node) {
  const int64_t N = node.integer("N");
  if (N < 2 || N % 2 != 0) node.fail("attribute N is " + std::to_string(N) + ", expected two equal halves");
  return {N / 2, N / 2};
}

inline void read_gated_weight(const NodeReader& node, spmm::Activation activation,
                              chunked_csc::CheckedWeight& weight, const std::array<int64_t, 2>& halves) {
  read_weight(node, activation, weight, "N is " + std::to_string(2 * halves[0]), halves);
  weight.weight.gated = true;
}

}  // namespace sparse_ops
