// Turning stored tensors, which may say anything, into a Weight that kernels can trust.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "kernels/spmm/kernel.h"

namespace sparse_ops::spmm {

// The attributes and tensors of one operator, as a model file gives them.
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
  Weight weight;
  std::vector<uint64_t> block_entries;  // what weight.block_entries points to
  std::vector<float> bias;              // what weight.bias points to where outputs of zeros lie between parts
};

// Check every rule of the format in one pass over everything but the values. Returns an empty string and
// fills `result`, or returns what is wrong: the tensor or attribute, where, and what was expected.
std::string check(const StoredWeight& stored, Activation activation, CheckedWeight& result);

}  // namespace sparse_ops::spmm
