// A stored weight as a file or a caller gives it: nothing is checked. What its attributes and vectors mean is
// known to its format, which makes a view of it that kernels can trust.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "ort_abi.h"

namespace sparse_ops {

// A vector of a stored weight in a format: the name of the input, and the type of its elements.
struct Part {
  const char* name;
  OrtElementType type;
};

// What a vector holds; float32 of any alignment.
struct RawArray {
  const void* data;
  size_t count;
};

struct RawWeight {
  std::span<const int64_t> sizes;   // attributes, in the order of the format
  std::span<const RawArray> parts;  // inputs, in the order of the format
  RawArray bias;                    // float32
  // Outputs of each of several linears, of which every one begins behind what fills up the one before; they
  // add up to N. Empty: one linear, or several with nothing between them.
  std::span<const int64_t> linears = {};
};

}  // namespace sparse_ops
