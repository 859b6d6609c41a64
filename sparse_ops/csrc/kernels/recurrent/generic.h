// The gates for any vector width. Included by one source file per instruction set.
#pragma once

#include "kernels/activations.h"
#include "kernels/recurrent/kernel.h"
#include "kernels/vector.h"

namespace sparse_ops::recurrent {
namespace {

template <size_t kLanes>
struct Lanes {};

template <size_t kLanes, class Do>
inline void for_each(size_t begin, size_t end, Do act) {
  size_t i = begin;
  for (; i + kLanes <= end; i += kLanes) act(i, Lanes<kLanes>());
  for (; i < end; ++i) act(i, Lanes<1>());
}

// x + p of a gate
template <size_t n>
inline Vector<n> sum(const Row& row, size_t gate, size_t i) {
  return load<n>(row.x + gate * row.hidden + i) + load<n>(row.p + gate * row.hidden + i);
}

template <size_t kLanes>
void lstm(const Row& row, size_t begin, size_t end) {
  for_each<kLanes>(begin, end, [&]<size_t n>(size_t i, Lanes<n>) {
    const Vector<n> candidate = hyperbolic_tangent<n>(sum<n>(row, 3, i));
    const Vector<n> kept = times_logistic<n>(sum<n>(row, 2, i), load<n>(row.c + i));
    const Vector<n> c = kept + times_logistic<n>(sum<n>(row, 0, i), candidate);
    store<n>(row.c + i, c);
    store<n>(row.h + i, times_logistic<n>(sum<n>(row, 1, i), hyperbolic_tangent<n>(c)));
  });
}

// h = (1 - z) candidate + z h
template <size_t n>
inline void update(const Row& row, size_t i, Vector<n> z, Vector<n> candidate) {
  store<n>(row.h + i, candidate + z * (load<n>(row.h + i) - candidate));
}

template <size_t kLanes>
void gru(const Row& row, size_t begin, size_t end) {
  for_each<kLanes>(begin, end, [&]<size_t n>(size_t i, Lanes<n>) {
    const Vector<n> z = times_logistic<n>(sum<n>(row, 0, i), splat<n>(1.0f));
    const Vector<n> past = times_logistic<n>(sum<n>(row, 1, i), load<n>(row.p + 2 * row.hidden + i));
    update<n>(row, i, z, hyperbolic_tangent<n>(load<n>(row.x + 2 * row.hidden + i) + past));
  });
}

template <size_t kLanes>
void gru_reset(const Row& row, size_t begin, size_t end) {
  for_each<kLanes>(begin, end, [&]<size_t n>(size_t i, Lanes<n>) {
    store<n>(row.p + i, times_logistic<n>(sum<n>(row, 0, i), splat<n>(1.0f)));
    store<n>(row.reset + i, times_logistic<n>(sum<n>(row, 1, i), load<n>(row.h + i)));
  });
}

template <size_t kLanes>
void gru_update(const Row& row, size_t begin, size_t end) {
  for_each<kLanes>(begin, end, [&]<size_t n>(size_t i, Lanes<n>) {
    update<n>(row, i, load<n>(row.p + i), hyperbolic_tangent<n>(sum<n>(row, 2, i)));
  });
}

template <size_t kLanes>
constexpr Kernel make_kernel(const KernelRow& row) {
  return {agreed(row, kLanes), lstm<kLanes>, gru<kLanes>, gru_reset<kLanes>, gru_update<kLanes>};
}

}  // namespace
}  // namespace sparse_ops::recurrent
