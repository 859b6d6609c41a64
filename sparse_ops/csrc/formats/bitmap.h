// The format bitmap (layout and rules: sparse_ops/formats/bitmap.py): the check of stored tensors.
#pragma once

#include <iterator>
#include <string>

#include "formats/raw.h"

namespace sparse_ops::bitmap {

constexpr const char* kFormat = "bitmap";
constexpr const char* kSizes[] = {"K", "N"};
constexpr Part kParts[] = {{"values", ORT_FLOAT}, {"mask", ORT_UINT8}};

// A weight whose arrays were checked.
struct Weight {
  size_t K, N;
  const unsigned char* values;  // float32, any alignment
  const uint8_t* mask;
  const unsigned char* bias;  // float32 [N]
};

// Check every rule of the format. Returns an empty string and fills `result`, or returns what is wrong.
std::string check(const RawWeight& raw, Weight& result);

}  // namespace sparse_ops::bitmap
