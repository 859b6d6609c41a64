// The loops for any vector width. Included by one source file per instruction set.
#pragma once

#include "kernels/peak/kernel.h"
#include "kernels/vector.h"

namespace sparse_ops::peak {
namespace {

template <size_t kLanes>
double in_registers(size_t steps) {
  constexpr size_t kChains = 12;
  Vector<kLanes> sum[kChains];
  const Vector<kLanes> factor = splat<kLanes>(0.5f), term = splat<kLanes>(0.25f);
#pragma GCC unroll 16
  for (size_t c = 0; c < kChains; ++c) sum[c] = splat<kLanes>(static_cast<float>(c));
  for (size_t i = 0; i < steps; ++i) {
#pragma GCC unroll 16
    for (size_t c = 0; c < kChains; ++c) sum[c] = sum[c] * factor + term;
  }
#pragma GCC unroll 16
  for (size_t c = 1; c < kChains; ++c) sum[0] += sum[c];
  [[maybe_unused]] volatile float keep = sum[0][0];
  return 2.0 * kLanes * kChains * static_cast<double>(steps);
}

template <size_t kLanes>
double with_loads(size_t steps) {
  constexpr size_t kChains = 12, kFloats = 4096;  // 16 KiB: half of the smallest first-level cache
  alignas(64) float factors[kFloats];
  for (size_t i = 0; i < kFloats; ++i) factors[i] = 0.5f;
  Vector<kLanes> sum[kChains];
  const Vector<kLanes> term = splat<kLanes>(0.25f);
#pragma GCC unroll 16
  for (size_t c = 0; c < kChains; ++c) sum[c] = splat<kLanes>(static_cast<float>(c));
  size_t at = 0;
  for (size_t i = 0; i < steps; ++i) {
#pragma GCC unroll 16
    for (size_t c = 0; c < kChains; ++c) sum[c] = sum[c] * load<kLanes>(factors + at + c * kLanes) + term;
    at += kChains * kLanes;
    if (at > kFloats - kChains * kLanes) at = 0;
  }
#pragma GCC unroll 16
  for (size_t c = 1; c < kChains; ++c) sum[0] += sum[c];
  [[maybe_unused]] volatile float keep = sum[0][0];
  return 2.0 * kLanes * kChains * static_cast<double>(steps);
}

template <size_t kLanes>
constexpr Kernel make_kernel(const KernelRow& row) {
  return {agreed(row, kLanes), in_registers<kLanes>, with_loads<kLanes>};
}

}  // namespace
}  // namespace sparse_ops::peak
