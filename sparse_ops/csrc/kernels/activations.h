// Activation functions on vectors of float32, accurate to a few units in the last place of the result.
#pragma once

#include "kernels/vector.h"

namespace sparse_ops {
namespace {

// 2^i for i in -126..127. Lanes outside give some number, never a trap.
template <size_t kLanes>
inline Vector<kLanes> power_of_two(IntVector<kLanes> i) {
  const IntVector<kLanes> bits = (i + 127) << 23;
  Vector<kLanes> result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}

// e^x: x = n ln 2 + r with |r| <= ln 2 / 2, and a polynomial of degree 6 for e^r (relative error 3.1e-9,
// fitted by iteratively reweighted least squares). Overflows to Inf, underflows through subnormals to 0,
// keeps NaN.
template <size_t kLanes>
inline Vector<kLanes> exponential(Vector<kLanes> x) {
  using V = Vector<kLanes>;
  const V largest = splat<kLanes>(90.0f), smallest = splat<kLanes>(-105.0f);
  x = x > largest ? largest : x;  // a comparison with NaN is false, so that NaN stays
  x = x < smallest ? smallest : x;
  // Adding 1.5 * 2^23 rounds to an integer, which is then the low bits of the sum.
  const V magic = splat<kLanes>(12582912.0f);
  const V sum = x * 1.44269504f + magic;
  const V n = sum - magic;
  const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts; n * the first one is exact
  V p = splat<kLanes>(1.3814319390803576e-3f);
  p = p * r + 8.368851616978645e-3f;
  p = p * r + 4.1668400168418884e-2f;
  p = p * r + 0.1666651964187622f;
  p = p * r + 0.4999999403953552f;
  p = p * (r * r) + r + 1.0f;
  IntVector<kLanes> sum_bits, magic_bits;
  __builtin_memcpy(&sum_bits, &sum, sizeof(sum_bits));
  __builtin_memcpy(&magic_bits, &magic, sizeof(magic_bits));
  const IntVector<kLanes> exponent = sum_bits - magic_bits;
  const IntVector<kLanes> half = exponent >> 1;  // in two factors, each of which is a normal number
  return p * power_of_two<kLanes>(half) * power_of_two<kLanes>(exponent - half);
}

// x Phi(x), Phi the normal distribution function. With t = |x| / sqrt(2): Phi(-|x|) = erfc(t) / 2, and
// erfc(t) = e^(-t^2) u P(u), u = 1 / (1 + 0.4 t) (relative error 6.2e-8 for t in 0..10, fitted likewise). No
// subtraction cancels, so that small results far left of zero are accurate too.
template <size_t kLanes>
inline Vector<kLanes> gelu(Vector<kLanes> x) {
  using V = Vector<kLanes>;
  const V zero = {};
  const V magnitude = x < zero ? -x : x;
  const V u = 1.0f / (1.0f + 0.28284271f * magnitude);
  V p = splat<kLanes>(0.04125275835394859f);
  p = p * u - 0.14031857252120972f;
  p = p * u + 0.08398722112178802f;
  p = p * u + 0.08796311169862747f;
  p = p * u + 0.07975810021162033f;
  p = p * u + 0.19339226186275482f;
  p = p * u + 0.20188789069652557f;
  p = p * u + 0.2264430671930313f;
  p = p * u + 0.22563423216342926f;
  const V tail = 0.5f * u * p * exponential<kLanes>(-0.5f * x * x);
  return x * (x < zero ? tail : 1.0f - tail);
}

// x / 2 (1 + tanh(v)) = x / (1 + e^(-2v)), v = sqrt(2 / pi) (x + 0.044715 x^3).
template <size_t kLanes>
inline Vector<kLanes> gelu_tanh(Vector<kLanes> x) {
  return x / (1.0f + exponential<kLanes>(-1.5957691f * x * (1.0f + 0.044715f * x * x)));
}

// x / (1 + e^(-x))
template <size_t kLanes>
inline Vector<kLanes> silu(Vector<kLanes> x) {
  return x / (1.0f + exponential<kLanes>(-x));
}

// x max(0, min(1, x / 6 + 1 / 2)), but NaN stays NaN
template <size_t kLanes>
inline Vector<kLanes> hard_swish(Vector<kLanes> x) {
  const Vector<kLanes> zero = {}, one = splat<kLanes>(1.0f);
  Vector<kLanes> gate = x * 0.16666667f + 0.5f;
  gate = gate < zero ? zero : gate;
  gate = gate > one ? one : gate;
  return x * gate;
}

// min(max(x, low), high), but NaN stays NaN
template <size_t kLanes>
inline Vector<kLanes> clip(Vector<kLanes> x, Vector<kLanes> low, Vector<kLanes> high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

// max(x, 0), but NaN stays NaN
template <size_t kLanes>
inline Vector<kLanes> relu(Vector<kLanes> x) {
  const Vector<kLanes> zero = {};
  return x < zero ? zero : x;
}

template <size_t kLanes, Vector<kLanes> (*kFunction)(Vector<kLanes>)>
inline void apply(float* data, size_t size) {
  for (size_t i = 0; i < size; i += kLanes) store<kLanes>(data + i, kFunction(load<kLanes>(data + i)));
}

}  // namespace
}  // namespace sparse_ops
