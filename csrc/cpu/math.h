// exp2 and tanh on vectors, with stated errors; the constants are minimax fits or published ones.
#pragma once

#include <cmath>
#include <cstring>

#include "vec.h"

namespace fastattn::cpu::FASTATTN_ISA {

constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

// 2^r for 0 <= r <= 1 with relative errors of 9.3e-8 (degree 5) or 3.4e-6 (degree 4) beside its roundings; exact at
// both ends, so that exponents a rounding apart have weights as close.
template <int kDegree>
FASTATTN_INLINE Vec<float> exp2_of_fraction(Vec<float> r) {
  static_assert(kDegree == 4 || kDegree == 5);
  Vec<float> p;
  if constexpr (kDegree == 5) {
    p = splat(1.8793186714e-3f);
    p = p * r + 8.9909950656e-3f;
    p = p * r + 5.5818675955e-2f;
    p = p * r + 2.4015927148e-1f;
    p = p * r + 6.9315173883e-1f;
  } else {
    p = splat(1.3555746630e-2f);
    p = p * r + 5.2032370243e-2f;
    p = p * r + 2.4137976218e-1f;
    p = p * r + 6.9303212095e-1f;
  }
  return p * r + 1.f;
}

// 2^x.  Relative error below 1.6e-7 for x in [-126, 127] (1.8e-7 where multiplication and addition round twice), or
// below 3.5e-6 at degree 4, which is for weights that are rounded to bfloat16 (2e-3) anyway; 2^0 is exactly 1; NaN for
// NaN.  In a FlushScope exactly 0 below -126 (also for -inf): denormals would cost the products that follow microcode
// assists.
template <int kDegree = 5>
FASTATTN_INLINE Vec<float> exp2(Vec<float> x) {
#if defined(__AVX512F__)
  // What rounding down leaves, in one operation where rounding takes two; `scalef` rounds its exponent down itself.
  const __m512 r = _mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  return (Vec<float>)_mm512_scalef_ps((__m512)exp2_of_fraction<kDegree>((Vec<float>)r), (__m512)x);
#else
  // Adding 1.5 * 2^23 leaves the nearest integer in the low mantissa bits; half of one less, that below (or at) x.
  constexpr float kShift = 12582912.f;
  const Vec<float> clamped = vmax(splat(-127.f), x);
  const Vec<float> shifted = (clamped - 0.5f) + kShift;
  const Vec<float> p = exp2_of_fraction<kDegree>(clamped - (shifted - kShift));
  // Above 127 the exponent would wrap into the sign; in a softmax they are far below that, so only NaN and +inf
  // (both already non-finite) can arrive there and the caller's x + r arithmetic has made p NaN.
  const Vec<int32_t> bits = (Vec<int32_t>)p + ((Vec<int32_t>)shifted << 23);
  const Vec<float> y = (Vec<float>)bits;
  const Vec<float> zero = {};
  const Vec<float> finite = x < -126.f ? zero : y;
  return x == x ? finite : x;
#endif
}

// 2^x in double: the Taylor series of 2^r on [-1/2, 1/2] to degree 13, error below 1 ulp; 0 below -1022.
template <int kDegree = 13>
FASTATTN_INLINE Vec<double> exp2(Vec<double> x) {
  const Vec<double> clamped = vmax(splat(-1023.0), x);
  const Vec<double> shifted = clamped + 6755399441055744.0;
  const Vec<double> y = (clamped - (shifted - 6755399441055744.0)) * kLn2;
  Vec<double> p = splat(1.0 / 6227020800.0);
  constexpr double inverse_factorial[] = {
      1.0,        1.0,         1.0 / 2,      1.0 / 6,       1.0 / 24,       1.0 / 120,      1.0 / 720,
      1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600};
  for (int k = 12; k >= 0; --k) p = p * y + inverse_factorial[k];
  const Vec<double> result = (Vec<double>)((Vec<int64_t>)p + ((Vec<int64_t>)shifted << 52));
  const Vec<double> zero = {};
  const Vec<double> finite = x < -1022.0 ? zero : result;
  return x == x ? finite : x;
}

// tanh: the Cephes polynomial near zero, (1 - e) / (1 + e) elsewhere; relative error below 4e-7.
FASTATTN_INLINE Vec<float> tanh(Vec<float> x) {
  const Vec<float> magnitude = x < 0.f ? -x : x;
  const Vec<float> e = exp2(magnitude * static_cast<float>(-2 * kLog2E));
  const Vec<float> large = (1.f - e) / (1.f + e);
  const Vec<float> z = x * x;
  Vec<float> p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Vec<float> small = p * z * x + x;
  return magnitude < 0.625f ? small : (x < 0.f ? -large : large);
}

FASTATTN_INLINE Vec<double> tanh(Vec<double> x) {
  Vec<double> y = x;
  for (int i = 0; i < kLanes<double>; ++i) y[i] = __builtin_tanh(x[i]);
  return y;
}

}  // namespace fastattn::cpu::FASTATTN_ISA
