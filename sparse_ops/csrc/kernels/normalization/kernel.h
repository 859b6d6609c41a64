// What one kernel for layer normalization is: plain data, so that sources compiled for wide vectors may
// include it.
//
// For every row of `channels` numbers, with s = x + skip:
//   layer normalization  y = (s - mean(s)) / sqrt(mean((s - mean(s))^2) + epsilon) * gamma + beta
//   RMS normalization    y = s / sqrt(mean(s^2) + epsilon) * gamma
#pragma once

#include <cstddef>

#include "kernels/row.h"

namespace sparse_ops::normalization {

// All arrays are row-major, and may have any alignment: constants lie where the model file has them.
struct Arguments {
  const void* x;      // float32 [rows, channels]
  const void* skip;   // float32 [skip_rows, channels], repeated for all rows; or nullptr: s = x
  const void* gamma;  // float32 [channels]
  const void* beta;   // float32 [channels], or nullptr: RMS normalization
  float* y;           // [rows, channels]
  float* sum;         // [rows, channels] where s goes, or nullptr; not used without skip
  size_t rows, skip_rows, channels;
  float epsilon;
};

struct Kernel : KernelRow {
  // Rows begin..end-1; they do not depend on each other.
  void (*run)(const Arguments& arguments, size_t begin, size_t end);
};

}  // namespace sparse_ops::normalization
