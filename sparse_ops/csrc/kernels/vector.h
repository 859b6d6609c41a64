// Float vectors of any power of two of lanes, over compiler vector extensions.
//
// Everything here and in the headers built on it has internal linkage and calls no inline function of another
// header: else the linker could keep the copy compiled for wide vectors and run it on a processor that lacks
// them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>  // index_sequence: types only

#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace sparse_ops {
namespace {

// Vectors that the processor holds.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr size_t kRegisters = 32;
#else
constexpr size_t kRegisters = 16;
#endif

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
  return s - Vector<kLanes>{};  // x - 0 is x for every x: what is left is the broadcast
}

// a < b ? a : b, lane by lane: b where one of them is NaN. On x86 that is one instruction, which compilers do
// not find.
template <size_t kLanes>
inline Vector<kLanes> minimum(Vector<kLanes> a, Vector<kLanes> b) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) return _mm512_maskz_min_ps(0xffff, a, b);
#endif
#if defined(__AVX__)
  if constexpr (kLanes == 8) return _mm256_min_ps(a, b);
#endif
#if defined(__SSE__)
  if constexpr (kLanes == 4) return _mm_min_ps(a, b);
#endif
  return a < b ? a : b;
}

// a > b ? a : b, lane by lane: b where one of them is NaN.
template <size_t kLanes>
inline Vector<kLanes> maximum(Vector<kLanes> a, Vector<kLanes> b) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) return _mm512_maskz_max_ps(0xffff, a, b);
#endif
#if defined(__AVX__)
  if constexpr (kLanes == 8) return _mm256_max_ps(a, b);
#endif
#if defined(__SSE__)
  if constexpr (kLanes == 4) return _mm_max_ps(a, b);
#endif
  return a > b ? a : b;
}

// |v|
template <size_t kLanes>
inline Vector<kLanes> magnitude(Vector<kLanes> v) {
  IntVector<kLanes> bits;
  __builtin_memcpy(&bits, &v, sizeof(bits));
  bits &= 0x7fffffff;
  __builtin_memcpy(&v, &bits, sizeof(v));
  return v;
}

inline float load_float(const unsigned char* from) {
  float value;
  __builtin_memcpy(&value, from, sizeof(value));
  return value;
}

// The sum of all lanes, by halves.
template <size_t kLanes>
inline float add_lanes(Vector<kLanes> v) {
  if constexpr (kLanes == 1) {
    return v[0];
  } else {
    Vector<kLanes / 2> half[2];
    __builtin_memcpy(half, &v, sizeof(half));
    return add_lanes<kLanes / 2>(half[0] + half[1]);
  }
}

// Lane l of the result is lane kIndices[l] of `a` followed by `b`.
template <size_t kLanes, size_t... kIndices>
inline Vector<kLanes> pick(Vector<kLanes> a, Vector<kLanes> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, static_cast<int>(kIndices)...);
#else
  return __builtin_shuffle(a, b, IntVector<kLanes>{static_cast<int32_t>(kIndices)...});
#endif
}

// Of two rows of a matrix that lie d apart, exchange the d x d blocks off the diagonal.
template <size_t kLanes, size_t d, size_t... l>
inline void exchange(Vector<kLanes>& a, Vector<kLanes>& b, std::index_sequence<l...>) {
  const Vector<kLanes> low = pick<kLanes, (l & d ? kLanes + l - d : l)...>(a, b);
  b = pick<kLanes, (l & d ? kLanes + l : l + d)...>(a, b);
  a = low;
}

// Transpose a kLanes x kLanes matrix in registers, by halves: first the two big blocks, last single elements.
template <size_t kLanes, size_t d = kLanes / 2>
inline void transpose_square(Vector<kLanes>* rows) {
  if constexpr (d > 0) {
#pragma GCC unroll 16
    for (size_t i = 0; i < kLanes; ++i) {
      if ((i & d) == 0) exchange<kLanes, d>(rows[i], rows[i + d], std::make_index_sequence<kLanes>());
    }
    transpose_square<kLanes, d / 2>(rows);
  }
}

// Transpose each of the 4 x 4 matrices that lie side by side in four vectors.
template <size_t kLanes, size_t... l>
inline void transpose_fours(Vector<kLanes> (&rows)[4], std::index_sequence<l...>) {
  Vector<kLanes> pairs[4];  // elements of rows 0 and 1 in turn, and of rows 2 and 3
#pragma GCC unroll 2
  for (size_t i = 0; i < 4; i += 2) {
    pairs[i] = pick<kLanes, (l % 2 * kLanes + l / 4 * 4 + l % 4 / 2)...>(rows[i], rows[i + 1]);
    pairs[i + 1] = pick<kLanes, (l % 2 * kLanes + l / 4 * 4 + l % 4 / 2 + 2)...>(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 2
  for (size_t i = 0; i < 2; ++i) {
    rows[2 * i] = pick<kLanes, (l % 4 < 2 ? l : kLanes + l - 2)...>(pairs[i], pairs[i + 2]);
    rows[2 * i + 1] = pick<kLanes, (l % 4 < 2 ? l + 2 : kLanes + l)...>(pairs[i], pairs[i + 2]);
  }
}

// columns[l][i] = from[i * step + l]: the first four columns of a matrix whose rows lie `step` apart. Pieces
// of four are put into place on their way from memory, so that only exchanges inside of fours are left.
template <size_t kLanes>
inline void load_columns(const float* from, size_t step, Vector<kLanes> (&columns)[4]) {
#pragma GCC unroll 4
  for (size_t i = 0; i < 4; ++i, from += step) {
#if defined(__AVX__)
    if constexpr (kLanes == 8) {
      columns[i] =
          _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from)), _mm_loadu_ps(from + 4 * step), 1);
      continue;
    }
#endif
    Vector<4> pieces[kLanes / 4];
    for (size_t p = 0; p < kLanes / 4; ++p) pieces[p] = load<4>(from + 4 * p * step);
    __builtin_memcpy(&columns[i], pieces, sizeof(pieces));
  }
  transpose_fours<kLanes>(columns, std::make_index_sequence<kLanes>());
}

}  // namespace
}  // namespace sparse_ops
