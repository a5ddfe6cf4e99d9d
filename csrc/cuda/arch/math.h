// The chip's fast functions, and what C++ has no name for in a kernel.  fmaxf, fmaf, sqrtf and the like are the
// language's.
#pragma once

#include "config.h"

#include <math.h>

namespace fastattn::cuda {

// 2^x within 2 ulp of float32; subnormal inputs count as zero and subnormal results are zero.
FASTATTN_DEVICE float exp2_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return sim::flush(exp2f(sim::flush(x)));
#endif
}

// log2 x: absolute error 2^-22 between 1/2 and 2, elsewhere relative; 0 gives -inf, negative numbers NaN.
FASTATTN_DEVICE float log2_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return log2f(sim::flush(x));
#endif
}

// 1 / x within 1 ulp; subnormal numbers are zeros of their sign on both sides.
FASTATTN_DEVICE float reciprocal_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return sim::flush(1.0f / sim::flush(x));
#endif
}

FASTATTN_DEVICE uint32_t bits_of(float x) {
#ifdef __CUDACC__
  return __float_as_uint(x);
#else
  return sim::to_bits(x);
#endif
}

FASTATTN_DEVICE float float_of(uint32_t bits) {
#ifdef __CUDACC__
  return __uint_as_float(bits);
#else
  return sim::from_bits<float>(bits);
#endif
}

// Byte n of the result is byte number `selector` >> 4 n & 7 of the eight of a (0 to 3) and b.
FASTATTN_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef __CUDACC__
  return __byte_perm(a, b, selector);
#else
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int n = 0; n < 4; ++n) result |= (static_cast<uint32_t>(bytes >> (8 * (selector >> 4 * n & 7))) & 0xFF) << 8 * n;
  return result;
#endif
}

FASTATTN_DEVICE float infinity() { return float_of(0x7F800000u); }
FASTATTN_DEVICE float not_a_number() { return float_of(0x7FC00000u); }

}  // namespace fastattn::cuda
