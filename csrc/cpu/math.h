// exp2 and tanh on vectors, with stated errors; the constants are minimax fits or published ones.
#pragma once

#include <cmath>
#include <cstring>

#include "vec.h"

namespace fastattn::cpu::FASTATTN_ISA {

constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

template <class T>
constexpr T kInfinity = static_cast<T>(__builtin_inf());

// 2^x.  Relative error below 1.6e-7 for x in [-126, 127], or below 3e-6 at degree 4, which is for weights that are
// rounded to bfloat16 (2e-3) anyway; 2^0 is exactly 1; exactly 0 below -126 (also for -inf), NaN for NaN.
// Flushing the denormals keeps them out of the products that follow, where they would cost microcode assists.
template <int kDegree = 5>
FASTATTN_INLINE Vec<float> exp2(Vec<float> x) {
#if defined(__AVX512F__)
  const __m512 v = (__m512)x;
  const __m512 n = _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const Vec<float> r = (Vec<float>)_mm512_sub_ps(v, n);
#else
  // Adding 1.5 * 2^23 leaves the nearest integer in the low mantissa bits.
  const Vec<float> clamped = vmax(splat(-127.f), x);
  const Vec<float> shifted = clamped + 12582912.f;
  const Vec<float> r = clamped - (shifted - 12582912.f);
#endif
  static_assert(kDegree == 4 || kDegree == 5);
  Vec<float> p;
  if constexpr (kDegree == 5) {
    p = splat(1.326472731307149e-3f);
    p = p * r + 9.671512991189957e-3f;
    p = p * r + 5.550733581185341e-2f;
    p = p * r + 2.402224242687e-1f;
    p = p * r + 6.931470036506653e-1f;
  } else {
    p = splat(9.585382389e-3f);
    p = p * r + 5.590662826e-2f;
    p = p * r + 2.402403817e-1f;
    p = p * r + 6.931241843e-1f;
  }
  p = p * r + 1.f;
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask(v, _mm512_set1_ps(-126.f), _CMP_NLT_UQ);
  return (Vec<float>)_mm512_maskz_scalef_ps(normal, (__m512)p, n);
#else
  // Above 127 the exponent would wrap into the sign; scores are at most 0 in a softmax, so only NaN and +inf
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
