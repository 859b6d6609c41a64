// Weights of few bits of which zeros are left out (layout and rules: sparse_ops/formats/nbits.py): turning
// stored tensors, which may say anything, into a weight that kernels can trust.
#pragma once

#include <string>
#include <vector>

#include "formats/raw.h"
#include "kernels/nbits/kernel.h"

namespace sparse_ops::nbits {

// The attributes and tensors by name. `kept` and `masks` are those of one layout each.
struct StoredWeight {
  Layout layout;
  int64_t K, N, group, kept;
  RawArray masks;   // uint8
  RawArray values;  // uint8
  RawArray scales;  // float16, any alignment
  RawArray zeros;   // uint8, of 4 bits with `has_zeros`
  bool has_zeros;
  RawArray bias;  // float32 [N]
};

struct CheckedWeight {
  Weight weight;
  std::vector<uint64_t> block_values;  // what weight.block_values points to
};

// Check every rule of the format in one pass over everything but the integers. Returns an empty string and
// fills `result`, or returns what is wrong: the tensor or attribute, where, and what was expected.
std::string check(const StoredWeight& stored, Activation activation, CheckedWeight& result);

}  // namespace sparse_ops::nbits
