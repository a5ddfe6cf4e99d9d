// Element types of operands, conversions to and from them, and the units of wide memory accesses.
#pragma once

#include "config.h"

namespace fastattn::cuda {

struct Half {};      // IEEE binary16
struct BFloat16 {};  // the upper half of binary32
struct E4M3 {};      // float8_e4m3fn: 448 is the largest number, 2^-9 the smallest; no infinity, NaN is 0x7F or 0xFF

struct alignas(8) Vec2 {
  uint32_t x[2];
};
struct alignas(16) Vec4 {
  uint32_t x[4];
};

template <class T>
inline constexpr bool kIsHalf = false;
template <>
inline constexpr bool kIsHalf<Half> = true;
template <class T>
inline constexpr bool kIsEight = false;
template <>
inline constexpr bool kIsEight<E4M3> = true;

// Two 16-bit numbers, rounded to nearest even, `low` in the low half.
template <class T>
FASTATTN_DEVICE uint32_t pack2(float low, float high) {
#ifdef __CUDACC__
  uint32_t pair;
  if constexpr (kIsHalf<T>) {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
#else
  return uint32_t{sim::round_to_16(low, kIsHalf<T>)} | uint32_t{sim::round_to_16(high, kIsHalf<T>)} << 16;
#endif
}

// Four E4M3 numbers, rounded to nearest even, beyond 448 to it; x0 in the lowest byte.
FASTATTN_DEVICE uint32_t pack4(float x0, float x1, float x2, float x3) {
#ifdef __CUDACC__
  uint32_t four;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"
      : "=r"(four)
      : "f"(x0), "f"(x1), "f"(x2), "f"(x3));
  return four;
#else
  return uint32_t{sim::round_to_e4m3(x0)} | uint32_t{sim::round_to_e4m3(x1)} << 8 |
         uint32_t{sim::round_to_e4m3(x2)} << 16 | uint32_t{sim::round_to_e4m3(x3)} << 24;
#endif
}

template <class T>
FASTATTN_DEVICE uint16_t pack1(float value) {
#ifdef __CUDACC__
  uint16_t result;
  if constexpr (kIsHalf<T>) {
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
  } else {
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
  }
  return result;
#else
  return sim::round_to_16(value, kIsHalf<T>);
#endif
}

template <class T>
FASTATTN_DEVICE float unpack1(uint16_t value) {
#ifdef __CUDACC__
  float result;
  if constexpr (kIsHalf<T>) {
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
  } else {
    result = __uint_as_float(uint32_t{value} << 16);
  }
  return result;
#else
  return sim::widen_from_16(value, kIsHalf<T>);
#endif
}

template <class T>
FASTATTN_DEVICE void unpack2(uint32_t pair, float& low, float& high) {
#ifdef __CUDACC__
  if constexpr (!kIsHalf<T>) {
    low = __uint_as_float(pair << 16);
    high = __uint_as_float(pair & 0xFFFF0000u);
    return;
  }
#endif
  low = unpack1<T>(static_cast<uint16_t>(pair & 0xFFFFu));
  high = unpack1<T>(static_cast<uint16_t>(pair >> 16));
}

}  // namespace fastattn::cuda
