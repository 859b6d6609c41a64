// The kernel's body for any vector width. Included by one source file per instruction set.
//
// Passes over one row, which stays in the first-level cache: the sum and its mean; the deviations from that
// mean, which also tell how far rounding put it from the true mean; the result.
#pragma once

#include "kernels/normalization/kernel.h"
#include "kernels/vector.h"

namespace sparse_ops::normalization {
namespace {

template <size_t kLanes>
struct Lanes {};

template <size_t kLanes>
struct Moments {
  Vector<kLanes> first{}, second{};
};

// `add(i, moments)` adds what channels i, i + 1, ... give, as many as `moments` has lanes. Over all channels,
// in independent sums, which hide the latency of an addition.
template <size_t kLanes, class Add>
inline Moments<1> total(size_t channels, Add add) {
  constexpr size_t kSums = 4;
  Moments<kLanes> sums[kSums];
  Moments<1> rest;
  size_t i = 0;
  for (; i + kSums * kLanes <= channels; i += kSums * kLanes) {
#pragma GCC unroll 4
    for (size_t s = 0; s < kSums; ++s) add(i + s * kLanes, sums[s]);
  }
  for (; i + kLanes <= channels; i += kLanes) add(i, sums[0]);
  for (; i < channels; ++i) add(i, rest);
  rest.first += add_lanes<kLanes>((sums[0].first + sums[1].first) + (sums[2].first + sums[3].first));
  rest.second += add_lanes<kLanes>((sums[0].second + sums[1].second) + (sums[2].second + sums[3].second));
  return rest;
}

template <size_t kLanes, class Do>
inline void for_each(size_t channels, Do act) {
  size_t i = 0;
  for (; i + kLanes <= channels; i += kLanes) act(i, Lanes<kLanes>());
  for (; i < channels; ++i) act(i, Lanes<1>());
}

inline const float* skip_row(const Arguments& a, size_t row) {
  const size_t at = a.skip_rows == a.rows ? row : row % a.skip_rows;
  return static_cast<const float*>(a.skip) + at * a.channels;
}

// s, which is also stored where the later passes find it
template <size_t n, bool kSkip>
inline Vector<n> read(const float* x, const float* skip, float* kept, size_t i) {
  Vector<n> s = load<n>(x + i);
  if constexpr (kSkip) {
    s += load<n>(skip + i);
    store<n>(kept + i, s);
  }
  return s;
}

// Rounding may leave a little less than nothing of a variance; NaN stays.
inline double inverse_root(double variance, float epsilon) {
  return 1 / __builtin_sqrt((variance < 0 ? 0 : variance) + static_cast<double>(epsilon));
}

template <size_t kLanes, bool kSkip>
void layer_rows(const Arguments& a, size_t begin, size_t end) {
  const double channels = static_cast<double>(a.channels);
  const float *gamma = static_cast<const float*>(a.gamma), *beta = static_cast<const float*>(a.beta);
  for (size_t row = begin; row < end; ++row) {
    const size_t at = row * a.channels;
    const float* x = static_cast<const float*>(a.x) + at;
    const float* skip = kSkip ? skip_row(a, row) : nullptr;
    float* y = a.y + at;
    float* kept = a.sum != nullptr ? a.sum + at : y;
    const float* s = kSkip ? kept : x;

    const auto sum = total<kLanes>(
        a.channels, [&]<size_t n>(size_t i, Moments<n>& m) { m.first += read<n, kSkip>(x, skip, kept, i); });
    const float mean = static_cast<float>(static_cast<double>(sum.first[0]) / channels);
    const auto deviation = total<kLanes>(a.channels, [&]<size_t n>(size_t i, Moments<n>& m) {
      const Vector<n> d = load<n>(s + i) - mean;
      m.first += d;
      m.second += d * d;
    });
    const double error = static_cast<double>(deviation.first[0]) / channels;  // true mean - mean
    const double square = static_cast<double>(deviation.second[0]) / channels;
    const double scale = inverse_root(square - error * error, a.epsilon);
    const float factor = static_cast<float>(scale), shift = static_cast<float>(-error * scale);
    for_each<kLanes>(a.channels, [&]<size_t n>(size_t i, Lanes<n>) {
      const Vector<n> normalized = (load<n>(s + i) - mean) * factor + shift;
      store<n>(y + i, normalized * load<n>(gamma + i) + load<n>(beta + i));
    });
  }
}

template <size_t kLanes, bool kSkip>
void rms_rows(const Arguments& a, size_t begin, size_t end) {
  const double channels = static_cast<double>(a.channels);
  const float* gamma = static_cast<const float*>(a.gamma);
  for (size_t row = begin; row < end; ++row) {
    const size_t at = row * a.channels;
    const float* x = static_cast<const float*>(a.x) + at;
    const float* skip = kSkip ? skip_row(a, row) : nullptr;
    float* y = a.y + at;
    float* kept = a.sum != nullptr ? a.sum + at : y;
    const float* s = kSkip ? kept : x;

    const auto sum = total<kLanes>(a.channels, [&]<size_t n>(size_t i, Moments<n>& m) {
      const Vector<n> v = read<n, kSkip>(x, skip, kept, i);
      m.second += v * v;
    });
    const double square = static_cast<double>(sum.second[0]) / channels;
    const float factor = static_cast<float>(inverse_root(square, a.epsilon));
    for_each<kLanes>(a.channels, [&]<size_t n>(size_t i, Lanes<n>) {
      store<n>(y + i, load<n>(s + i) * factor * load<n>(gamma + i));
    });
  }
}

template <size_t kLanes>
void run_rows(const Arguments& a, size_t begin, size_t end) {
  if (a.beta != nullptr) {
    a.skip != nullptr ? layer_rows<kLanes, true>(a, begin, end) : layer_rows<kLanes, false>(a, begin, end);
  } else {
    a.skip != nullptr ? rms_rows<kLanes, true>(a, begin, end) : rms_rows<kLanes, false>(a, begin, end);
  }
}

template <size_t kLanes>
constexpr Kernel make_kernel(const KernelRow& row) {
  return {agreed(row, kLanes), run_rows<kLanes>};
}

}  // namespace
}  // namespace sparse_ops::normalization
