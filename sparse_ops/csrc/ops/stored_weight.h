// The compressed weight of a node, as all sparse operators store it.
#pragma once

#include "kernels/spmm/check.h"
#include "ops/op_support.h"

namespace sparse_ops {

struct WeightInput {
  const char* name;
  OrtElementType type;
};
// The inputs that hold it, in order, right behind the activations.
constexpr WeightInput kWeightInputs[] = {{"values", ORT_FLOAT},
                                         {"offsets", ORT_UINT8},
                                         {"counts", ORT_UINT8},
                                         {"rows", ORT_UINT8},
                                         {"bias", ORT_FLOAT}};

// Read and check them, from input `first` on; they stay where they are. Names of a node's second weight have
// a `prefix`.
inline void read_weight(const NodeReader& node, spmm::Activation activation, spmm::CheckedWeight& weight,
                        const std::string& prefix = "", size_t first = 1) {
  node.expect("format", "chunked_csc");
  const auto size = [&](const char* name) { return node.integer((prefix + name).c_str()); };
  const auto input = [&](size_t index) {
    const auto& [name, type] = kWeightInputs[index];
    return node.constant(first + index, (prefix + name).c_str(), type);
  };
  const auto bytes = [](const NodeReader::Constant& c) { return static_cast<const uint8_t*>(c.data); };
  const NodeReader::Constant values = input(0), offsets = input(1), counts = input(2), rows = input(3),
                             bias = input(4);
  const spmm::StoredWeight stored = {size("K"),    size("N"),    size("chunk"),  size("block"), size("width"),
                                     values.data,  values.count, bytes(offsets), offsets.count, bytes(counts),
                                     counts.count, bytes(rows),  rows.count,     bias.data,     bias.count};
  const std::string problem = spmm::check(stored, activation, weight);
  if (!problem.empty()) node.fail(prefix.empty() ? problem : "weight " + prefix + "*: " + problem);
}

// Refuse a gated weight whose halves are not whole blocks.
inline void check_gate(const NodeReader& node, const spmm::Weight& weight) {
  if (weight.N % (2 * weight.block) != 0) {
    node.fail("attribute N is " + std::to_string(weight.N) + ", expected two halves of whole blocks of " +
              std::to_string(weight.block));
  }
}

}  // namespace sparse_ops
