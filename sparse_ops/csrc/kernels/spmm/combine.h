// A weighted sum of shifted rows: what is left of a product where every input channel has its own outputs.
// Included like generic.h.
#pragma once

#include "kernels/vector.h"

namespace sparse_ops::spmm {
namespace {

// acc[t] += sum over entries for kVectors vectors from t on.
template <size_t kLanes, size_t kVectors>
inline void combine_vectors(const size_t* shifts, const unsigned char* values, size_t entries,
                            Vector<kLanes> bias, const float* from, float* acc) {
  Vector<kLanes> sum[kVectors];
#pragma GCC unroll 8
  for (size_t v = 0; v < kVectors; ++v) sum[v] = bias;
  for (size_t e = 0; e < entries; ++e) {
    const Vector<kLanes> w = splat<kLanes>(load_float(values + 4 * e));
    const float* row = from + shifts[e];
#pragma GCC unroll 8
    for (size_t v = 0; v < kVectors; ++v) sum[v] += w * load<kLanes>(row + v * kLanes);
  }
#pragma GCC unroll 8
  for (size_t v = 0; v < kVectors; ++v) store<kLanes>(acc + v * kLanes, sum[v]);
}

template <size_t kLanes>
void combine(const size_t* shifts, const unsigned char* values, size_t entries, float bias, size_t count,
             const float* from, float* acc) {
  const Vector<kLanes> start = splat<kLanes>(bias);
  size_t t = 0;
  for (; t + 8 * kLanes <= count; t += 8 * kLanes) {
    combine_vectors<kLanes, 8>(shifts, values, entries, start, from + t, acc + t);
  }
  for (; t + 2 * kLanes <= count; t += 2 * kLanes) {
    combine_vectors<kLanes, 2>(shifts, values, entries, start, from + t, acc + t);
  }
  for (; t < count; t += kLanes) {
    combine_vectors<kLanes, 1>(shifts, values, entries, start, from + t, acc + t);
  }
}

}  // namespace
}  // namespace sparse_ops::spmm
