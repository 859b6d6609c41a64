// The formats int8_quads and int8_dense (layout and rules: sparse_ops/formats/int8_quads.py): turning stored
// tensors, which may say anything, into a weight that kernels can trust.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "formats/raw.h"
#include "kernels/quads/kernel.h"

namespace sparse_ops::int8_quads {

constexpr const char* kSizes[] = {"K", "N", "chunk", "block"};

// With the quads that have a weight other than 0, or with all quads.
constexpr const char* kFormat = "int8_quads";
constexpr Part kParts[] = {{"values", ORT_INT8},
                           {"offsets", ORT_UINT8},
                           {"counts", ORT_UINT8},
                           {"rows", ORT_UINT8},
                           {"scales", ORT_FLOAT}};
constexpr const char* kDenseFormat = "int8_dense";
constexpr Part kDenseParts[] = {{"values", ORT_INT8}, {"scales", ORT_FLOAT}};

struct CheckedWeight {
  quads::Weight weight;
  // What the weight points to, if the parts do not hold it.
  std::vector<uint64_t> block_entries;
  std::vector<int32_t> sums;
  std::vector<uint8_t> counts, rows;
};

// Check every rule of the format with that many parts and add up the integers of every output. Returns an empty
// string and fills `result`, or returns what is wrong: the tensor or attribute, where, and what was expected.
std::string check(const RawWeight& raw, quads::Activation activation, CheckedWeight& result);

}  // namespace sparse_ops::int8_quads
