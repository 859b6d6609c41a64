// The format chunked_csc (layout and rules: sparse_ops/formats/chunked_csc.py): turning stored tensors, which
// may say anything, into a weight that kernels can trust.
#pragma once

#include <cstring>
#include <iterator>
#include <span>
#include <string>
#include <vector>

#include "formats/raw.h"
#include "kernels/spmm/kernel.h"

namespace sparse_ops::chunked_csc {

// Values of the attribute `format`: one weight, of which several linears may have whole blocks each; and with
// outputs of zeros that fill the last block of each linear.
constexpr const char* kFormat = "chunked_csc";
constexpr const char* kPartsFormat = "chunked_csc_parts";

constexpr const char* kSizes[] = {"K", "N", "chunk", "block", "width"};
constexpr Part kParts[] = {
    {"values", ORT_FLOAT}, {"offsets", ORT_UINT8}, {"counts", ORT_UINT8}, {"rows", ORT_UINT8}};

inline bool is_format(const char* name) {
  return std::strcmp(name, kFormat) == 0 || std::strcmp(name, kPartsFormat) == 0;
}

// The attributes and tensors by name.
struct StoredWeight {
  int64_t K, N, chunk, block, width;
  const void* values;  // float32, any alignment
  size_t value_count;
  const uint8_t* offsets;
  size_t offset_count;
  const uint8_t* counts;
  size_t count_count;
  const uint8_t* rows;
  size_t row_count;
  const void* bias;  // float32, any alignment
  size_t bias_count;
  // Outputs of each of several linears, of which every one begins a block of its own, behind outputs of
  // zeros; they add up to N. Empty: one linear, or whole blocks of all but the last.
  std::span<const int64_t> parts = {};
};

struct CheckedWeight {
  spmm::Weight weight;
  std::vector<uint64_t> block_entries;  // what weight.block_entries points to
  std::vector<float> bias;              // what weight.bias points to where outputs of zeros lie between parts
};

// Check every rule of the format in one pass over everything but the values. Returns an empty string and
// fills `result`, or returns what is wrong: the tensor or attribute, where, and what was expected.
std::string check(const StoredWeight& stored, spmm::Activation activation, CheckedWeight& result);
std::string check(const RawWeight& raw, spmm::Activation activation, CheckedWeight& result);

// What is wrong with the sizes, or an empty string; else what kernels are chosen by, without any array.
std::string check_sizes(std::span<const int64_t> sizes, spmm::Weight& result);

}  // namespace sparse_ops::chunked_csc
