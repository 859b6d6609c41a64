// What every row of a kernels.inc says about its kernel: plain data, so that sources compiled for wide
// vectors may include it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu_features.h"

namespace sparse_ops {

// Of the numbers that a kernel multiplies or normalizes.
enum ValueType : uint8_t { float32, int8 };

struct KernelRow {
  const char* name;
  Features needs;  // all that its source is compiled for
  ValueType values;
  size_t lanes;     // of its vectors
  size_t tile = 1;  // tokens or queries that it takes at a time, at most
};

// The row, if its kernel has that shape; what disagrees is no constant, and does not compile.
constexpr KernelRow agreed(const KernelRow& row, size_t lanes, size_t tile = 1) {
  if (row.lanes != lanes || row.tile != tile) throw "kernels.inc says other lanes or another tile";
  return row;
}

}  // namespace sparse_ops
