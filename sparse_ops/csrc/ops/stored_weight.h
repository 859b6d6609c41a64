// The compressed weight of a node, as all sparse operators store it.
#pragma once

#include <array>
#include <span>
#include <string>

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

// How they lie: as one weight, of which several linears may have whole blocks each, or with outputs of zeros
// that fill the last block of each linear.
constexpr const char* kFormat = "chunked_csc";
constexpr const char* kPartsFormat = "chunked_csc_parts";

// Read and check them, from input `first` on; they stay where they are. Names of a node's second weight have
// a `prefix`. With `parts` they are in kPartsFormat, and these are the outputs of each linear.
inline void read_tensors(const NodeReader& node, spmm::Activation activation, spmm::CheckedWeight& weight,
                         std::span<const int64_t> parts, const std::string& prefix = "", size_t first = 1) {
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
                                     counts.count, bytes(rows),  rows.count,     bias.data,     bias.count,
                                     parts};
  const std::string problem = spmm::check(stored, activation, weight);
  if (!problem.empty()) node.fail(prefix.empty() ? problem : "weight " + prefix + "*: " + problem);
}

// A weight of one linear.
inline void read_weight(const NodeReader& node, spmm::Activation activation, spmm::CheckedWeight& weight,
                        const std::string& prefix = "", size_t first = 1) {
  node.expect("format", kFormat);
  read_tensors(node, activation, weight, {}, prefix, first);
}

// A weight of several linears side by side, `split` outputs each; `name` is what says so. Each begins with a
// block of its own: in kFormat because those before it have whole blocks.
inline void read_weight(const NodeReader& node, spmm::Activation activation, spmm::CheckedWeight& weight,
                        const std::string& name, std::span<const int64_t> split) {
  if (node.one_of("format", {kFormat, kPartsFormat}) == 1) {
    return read_tensors(node, activation, weight, split);
  }
  read_tensors(node, activation, weight, {});
  const auto N = static_cast<int64_t>(weight.weight.N), block = static_cast<int64_t>(weight.weight.block);
  bool good = true;
  int64_t left = N;
  for (int64_t outputs : split) {
    good = good && outputs >= 1 && outputs <= left && (outputs == left || outputs % block == 0);
    if (good) left -= outputs;
  }
  if (!good || left != 0) {
    node.fail("attribute " + name + ", expected " + std::to_string(split.size()) +
              " sizes that add up to N = " + std::to_string(N) + ", all but the last multiples of block " +
              std::to_string(block));
  }
}

// The halves of a gated weight, gate and up projection.
inline std::array<int64_t, 2> read_halves(const NodeReader& node) {
  const int64_t N = node.integer("N");
  if (N < 2 || N % 2 != 0) node.fail("attribute N is " + std::to_string(N) + ", expected two equal halves");
  return {N / 2, N / 2};
}

inline void read_gated_weight(const NodeReader& node, spmm::Activation activation,
                              spmm::CheckedWeight& weight, const std::array<int64_t, 2>& halves) {
  read_weight(node, activation, weight, "N is " + std::to_string(2 * halves[0]), halves);
  weight.weight.gated = true;
}

}  // namespace sparse_ops
