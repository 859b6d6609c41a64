// What one kernel for attention is: plain data, so that sources compiled for wide vectors may include it.
//
// For every batch and head, Y = softmax(scale * Q Kᵀ + mask) V, softmax over the keys. Rows of scores that
// are all -Inf, or have NaN or Inf, have weights of NaN, or of 0 if asked for; no keys give zeros.
#pragma once

#include <cstddef>

#include "kernels/row.h"

namespace sparse_ops::attention {

// float32 [batches, heads, rows, channels] in any order but for the channels, which lie side by side.
// Distances count elements. Any alignment: constants lie where the model file has them.
struct Operand {
  const void* data;
  size_t batch, head, row;
};

// float32 [batches, heads, queries, keys]; a distance of 0 repeats what is there.
struct Mask {
  const void* data;  // or nullptr: no mask
  size_t batch, head, row, key;
};

struct Arguments {
  Operand q, k, v;
  Mask mask;
  float* y;  // [batches, queries, heads * value_size]
  size_t batches, heads, queries, keys;
  size_t size, value_size;  // channels of a query or key, and of a value
  float scale;
  bool nan_to_zero;  // weights that are NaN count as 0
};

// Queries first..first + count - 1 of one batch and head.
struct Tile {
  size_t batch, head, first, count;
};

// Keys whose weights are in memory at a time.
constexpr size_t kKeyBlock = 64;
// Floats between values and results, both often a multiple of 4 KiB long: at the same place of a page, a
// store to one would hold up loads from the other.
constexpr size_t kApart = 32;
// Up to this many keys stay in the second-level cache with what else a head needs: they are read where they
// lie.
constexpr size_t kFewKeys = 256;
// Up to this many queries, a kernel puts channels into the lanes of vectors, else queries.
constexpr size_t kFewQueries = 3;

// `tile` counts queries, and is a multiple of `lanes`.
struct Kernel : KernelRow {
  // Tiles do not depend on each other. `mask` is what lay_mask() made, or nullptr. `scratch` is aligned to 64
  // bytes and has scratch_floats(); neither is looked at where a kernel has no lay_mask().
  void (*run)(const Arguments& arguments, const Tile& tile, const float* mask, float* scratch);

  // A mask as run() wants it for the tile, as many floats as keys times queries, in the kernel's own order:
  // may be used for all heads where the mask is the same.
  void (*lay_mask)(const Arguments& arguments, const Tile& tile, float* to);
};

}  // namespace sparse_ops::attention
