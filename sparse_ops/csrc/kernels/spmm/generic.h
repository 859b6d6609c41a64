// The kernel's body over compiler vector extensions, for vectors of any power of two of lanes.
//
// Included by one source file per instruction set. Everything here has internal linkage, and no inline function of
// another header is called: else the linker could keep the copy compiled for wide vectors and run it on a processor
// that lacks them.
#pragma once

#include "kernels/spmm/spmm.h"

namespace sparse_ops::spmm {
namespace {

template <size_t kLanes>
struct VectorOf {
  typedef float Float __attribute__((vector_size(kLanes * 4)));
  typedef int32_t Int __attribute__((vector_size(kLanes * 4)));
};
template <size_t kLanes>
using Vector = typename VectorOf<kLanes>::Float;
template <size_t kLanes>
using IntVector = typename VectorOf<kLanes>::Int;

template <size_t kLanes>
inline Vector<kLanes> load(const void* from) {
  Vector<kLanes> v;
  __builtin_memcpy(&v, from, sizeof(v));
  return v;
}

template <size_t kLanes>
inline void store(void* to, Vector<kLanes> v) {
  __builtin_memcpy(to, &v, sizeof(v));
}

template <size_t kLanes>
inline Vector<kLanes> splat(float s) {
  return s - Vector<kLanes>{};  // x - 0 is x for every x, so that only the broadcast is left
}

inline float load_float(const unsigned char* from) {
  float value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

// acc[tile] += one segment. kSets independent accumulators per vector hide the latency of the multiply-add.
template <size_t kLanes, size_t kVectors, size_t kSets>
inline void add_segment(const float* x, const uint8_t* offsets, const unsigned char* values, size_t count, float* acc) {
  constexpr size_t kTile = kLanes * kVectors;
  Vector<kLanes> sum[kSets][kVectors];
#pragma GCC unroll 16
  for (size_t v = 0; v < kVectors; ++v) sum[0][v] = load<kLanes>(acc + v * kLanes);
#pragma GCC unroll 16
  for (size_t s = 1; s < kSets; ++s) {
#pragma GCC unroll 16
    for (size_t v = 0; v < kVectors; ++v) sum[s][v] = Vector<kLanes>{};
  }
  size_t i = 0;
  for (; i + 4 <= count; i += 4) {
    uint32_t four;  // one load for the offsets of four entries
    __builtin_memcpy(&four, offsets + i, sizeof(four));
#pragma GCC unroll 4
    for (size_t j = 0; j < 4; ++j) {
      const float* row = x + ((four >> (8 * j)) & 255) * kTile;
      const Vector<kLanes> w = splat<kLanes>(load_float(values + 4 * (i + j)));
#pragma GCC unroll 16
      for (size_t v = 0; v < kVectors; ++v) sum[j % kSets][v] += w * load<kLanes>(row + v * kLanes);
    }
  }
#pragma GCC unroll 4
  for (size_t j = 0; j < 3; ++j) {
    if (i == count) break;
    const float* row = x + offsets[i] * kTile;
    const Vector<kLanes> w = splat<kLanes>(load_float(values + 4 * i));
#pragma GCC unroll 16
    for (size_t v = 0; v < kVectors; ++v) sum[j % kSets][v] += w * load<kLanes>(row + v * kLanes);
    ++i;
  }
#pragma GCC unroll 16
  for (size_t v = 0; v < kVectors; ++v) {
#pragma GCC unroll 16
    for (size_t s = 1; s < kSets; ++s) sum[0][v] += sum[s][v];
    store<kLanes>(acc + v * kLanes, sum[0][v]);
  }
}

template <size_t kLanes, size_t kVectors, size_t kSets>
void multiply(const Weight& w, size_t block, const float* panel, size_t tokens, float* y) {
  constexpr size_t kTile = kLanes * kVectors;
  alignas(64) float acc[kMaxAccumulators];
  for (size_t i = 0; i < w.block * kTile; ++i) acc[i] = 0;
  const unsigned char* values = w.values + 4 * w.block_entries[block];
  const uint8_t* offsets = w.offsets + w.block_entries[block];
  const uint8_t* counts = w.counts + block * w.chunks * w.block;
  const uint8_t* rows = w.rows + block * w.chunks * w.block;
  for (size_t c = 0; c < w.chunks; ++c) {
    const float* x = panel + c * w.chunk * kTile;
    for (size_t s = 0; s < w.block; ++s) {
      const size_t count = *counts++;
      add_segment<kLanes, kVectors, kSets>(x, offsets, values, count, acc + *rows++ * kTile);
      offsets += count;
      values += 4 * count;
    }
  }
  for (size_t t = 0; t < tokens; ++t)
    for (size_t n = 0; n < w.block && block * w.block + n < w.N; ++n) y[t * w.N + block * w.block + n] = acc[n * kTile + t];
}

template <size_t kLanes>
double peak(size_t steps) {
  constexpr size_t kChains = 10;
  Vector<kLanes> sum[kChains];
  Vector<kLanes> a = splat<kLanes>(0.5f), b = splat<kLanes>(0.25f);
  for (size_t c = 0; c < kChains; ++c) sum[c] = splat<kLanes>(static_cast<float>(c));
  for (size_t i = 0; i < steps; ++i) {
#pragma GCC unroll 16
    for (size_t c = 0; c < kChains; ++c) sum[c] = sum[c] * a + b;
  }
  for (size_t c = 1; c < kChains; ++c) sum[0] += sum[c];
  volatile float sink = sum[0][0];
  (void)sink;
  return 2.0 * kLanes * kChains * static_cast<double>(steps);
}

}  // namespace
}  // namespace sparse_ops::spmm
