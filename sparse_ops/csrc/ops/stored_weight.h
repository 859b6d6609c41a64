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

// Read and check them; they stay where they are.
inline void read_weight(const NodeReader& node, spmm::Activation activation, spmm::CheckedWeight& weight) {
  node.expect("format", "chunked_csc");
  const auto input = [&](size_t index) {
    return node.constant(1 + index, kWeightInputs[index].name, kWeightInputs[index].type);
  };
  const auto bytes = [](const NodeReader::Constant& c) { return static_cast<const uint8_t*>(c.data); };
  const NodeReader::Constant values = input(0), offsets = input(1), counts = input(2), rows = input(3),
                             bias = input(4);
  const spmm::StoredWeight stored = {node.integer("K"),
                                     node.integer("N"),
                                     node.integer("chunk"),
                                     node.integer("block"),
                                     node.integer("width"),
                                     values.data,
                                     values.count,
                                     bytes(offsets),
                                     offsets.count,
                                     bytes(counts),
                                     counts.count,
                                     bytes(rows),
                                     rows.count,
                                     bias.data,
                                     bias.count};
  const std::string problem = spmm::check(stored, activation, weight);
  if (!problem.empty()) node.fail(problem);
}

}  // namespace sparse_ops
