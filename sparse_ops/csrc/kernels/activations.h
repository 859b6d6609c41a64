// Activation functions on vectors of float32, accurate to a few units in the last place of the result.
#pragma once

#include "kernels/vector.h"

namespace sparse_ops {
namespace {

// y / d for d >= 1, d = Inf and d = NaN, to two units in the last place.
template <size_t kLanes>
inline Vector<kLanes> quotient(Vector<kLanes> y, Vector<kLanes> d) {
#if defined(__AVX512F__)
  if constexpr (kLanes == 16) {  // one Newton step instead of a division, which is slow in the widest vectors
    const __m512 one = _mm512_set1_ps(1.0f), start = _mm512_maskz_rcp14_ps(0xffff, d);
    const __mmask16 finite = _mm512_cmp_ps_mask(d, _mm512_set1_ps(__builtin_inff()), _CMP_LT_OQ);
    return y * _mm512_mask_fmadd_ps(start, finite, _mm512_fnmadd_ps(d, start, one), start);
  }
#endif
  return y / d;
}

// e^x for x from kExponentialZero, where it is 0, to 88.75, where it is Inf. x = n ln 2 + r with |r| <= ln 2
// / 2, and a polynomial of degree 5 for e^r (relative error 1.1e-7, fitted by iteratively reweighted least
// squares). NaN stays NaN.
constexpr float kExponentialZero = -88.0f;
template <size_t kLanes>
inline Vector<kLanes> exponential(Vector<kLanes> x) {
  using V = Vector<kLanes>;
  // Adding 1.5 * 2^23 rounds to an integer, which is then the low bits of the sum.
  const V magic = splat<kLanes>(12582912.0f);
  const V sum = x * 1.44269504f + magic;
  const V n = sum - magic;
  const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts; n * the first one is exact
  V p = splat<kLanes>(8.312529629196415e-3f);
  p = p * r + 4.1890137756624236e-2f;
  p = p * r + 0.16667114492836776f;
  p = p * r + 0.49999231623254226f;
  p = p * (r * r) + r + 1.0f;
  IntVector<kLanes> bits, magic_bits;
  __builtin_memcpy(&bits, &sum, sizeof(bits));
  __builtin_memcpy(&magic_bits, &magic, sizeof(magic_bits));
  bits = (bits - magic_bits + 127) << 23;  // 2^n; 0 for n = -127 and Inf for n = 128
  V power;
  __builtin_memcpy(&power, &bits, sizeof(power));
  return p * power;
}

// 1 / (1 + e^(-x)) times y. Beyond +-88.7, e^(-x) is Inf or 1e-38, which the sum turns into 0 and y. NaN
// stays NaN.
template <size_t kLanes>
inline Vector<kLanes> times_logistic(Vector<kLanes> x, Vector<kLanes> y) {
  x = minimum<kLanes>(splat<kLanes>(88.75f), -x);
  x = maximum<kLanes>(splat<kLanes>(-87.3f), x);
  return quotient<kLanes>(y, 1.0f + exponential<kLanes>(x));
}

// tanh(x) = 1 - 2 / (1 + e^(2x)); near 0, where that difference would lose digits, x + x^3 p(x^2) with p
// fitted by iteratively reweighted least squares (relative error 7e-9). NaN stays NaN.
template <size_t kLanes>
inline Vector<kLanes> hyperbolic_tangent(Vector<kLanes> x) {
  using V = Vector<kLanes>;
  const V square = x * x;
  V p = splat<kLanes>(-0.005515085067600012f);
  p = p * square + 0.02046934701502323f;
  p = p * square - 0.05368800088763237f;
  p = p * square + 0.1333083063364029f;
  p = p * square - 0.3333325982093811f;
  const V far = 1.0f - times_logistic<kLanes>(-2.0f * x, splat<kLanes>(2.0f));
  return magnitude<kLanes>(x) < 0.65f ? x + x * square * p : far;
}

// x Phi(x), Phi the normal distribution function. The tail Phi(-|x|) is the fourth power of a polynomial in
// |x|, fitted by iteratively reweighted least squares for |x| < 5.7 and 0 beyond: its fourth root is smooth
// and falls slowly, and a power makes small what is left of the error where the tail is small. The error is
// at most 4e-7 of the result plus 4e-8, or 6e-8 without fused multiply-adds.
template <size_t kLanes>
inline Vector<kLanes> gelu(Vector<kLanes> x) {
  using V = Vector<kLanes>;
  const V zero = {}, one = splat<kLanes>(1.0f), distance = magnitude<kLanes>(x);
  V p = splat<kLanes>(5.2018227133457564e-08f);
  p = p * distance - 9.201875767690778e-07f;
  p = p * distance + 3.235289579663184e-06f;
  p = p * distance + 3.3252499292226134e-05f;
  p = p * distance - 0.0002535815953532527f;
  p = p * distance - 9.94776080301318e-05f;
  p = p * distance + 0.003833854661963978f;
  p = p * distance + 0.004643344840381594f;
  p = p * distance - 0.050200644564410354f;
  p = p * distance - 0.1677330773550281f;
  p = p * distance + 0.8408963881261706f;
  p *= p;
  p *= p;
  const V tail = distance < 5.7f ? p : zero;
  return x * magnitude<kLanes>((x < zero ? zero : one) - tail);  // NaN and -Inf * 0 are NaN
}

// x / 2 (1 + tanh(v)) = x / (1 + e^(-2v)), v = sqrt(2 / pi) (x + 0.044715 x^3).
template <size_t kLanes>
inline Vector<kLanes> gelu_tanh(Vector<kLanes> x) {
  return times_logistic<kLanes>(1.5957691f * x * (1.0f + 0.044715f * x * x), x);
}

// x / (1 + e^(-x))
template <size_t kLanes>
inline Vector<kLanes> silu(Vector<kLanes> x) {
  return times_logistic<kLanes>(x, x);
}

// x / (1 + e^(-1.702 x))
template <size_t kLanes>
inline Vector<kLanes> quick_gelu(Vector<kLanes> x) {
  return times_logistic<kLanes>(1.702f * x, x);
}

// x max(0, min(1, x / 6 + 1 / 2)), but NaN stays NaN
template <size_t kLanes>
inline Vector<kLanes> hard_swish(Vector<kLanes> x) {
  const Vector<kLanes> zero = {}, one = splat<kLanes>(1.0f);
  Vector<kLanes> gate = x * 0.16666667f + 0.5f;
  gate = maximum<kLanes>(zero, gate);
  gate = minimum<kLanes>(one, gate);
  return x * gate;
}

// min(max(x, low), high), but NaN stays NaN
template <size_t kLanes>
inline Vector<kLanes> clip(Vector<kLanes> x, Vector<kLanes> low, Vector<kLanes> high) {
  x = maximum<kLanes>(low, x);
  return minimum<kLanes>(high, x);
}

// max(x, 0), but NaN stays NaN
template <size_t kLanes>
inline Vector<kLanes> relu(Vector<kLanes> x) {
  const Vector<kLanes> zero = {};
  return maximum<kLanes>(zero, x);
}

template <size_t kLanes, Vector<kLanes> (*kFunction)(Vector<kLanes>)>
inline void apply(float* data, size_t size) {
  for (size_t i = 0; i < size; i += kLanes) store<kLanes>(data + i, kFunction(load<kLanes>(data + i)));
}

}  // namespace
}  // namespace sparse_ops
