// Conversions between float32 and 16-bit numbers, without branches, so that loops over them become vector code.
#pragma once

#include <cstdint>

#include "instructions.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
// One binary for all machines; products of two 16-bit numbers are exact, so a fused multiply-add changes nothing.
#define FASTATTN_CLONES __attribute__((target_clones("avx2,fma", "default")))
#else
#define FASTATTN_CLONES
#endif

namespace fastattn::cuda::sim {

inline float half_to_float(uint16_t value) {
  const uint32_t sign = (uint32_t{value} & 0x8000u) << 16, rest = uint32_t{value} & 0x7FFFu;
  const uint32_t normal = (rest << 13) + (112u << 23);
  const uint32_t infinite = (rest << 13) | 0x7F800000u;
  const uint32_t tiny = to_bits(static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-24f);  // exact
  const uint32_t bits = rest < 0x0400u ? tiny : rest < 0x7C00u ? normal : infinite;
  return from_bits<float>(bits | sign);
}

inline float bfloat16_to_float(uint16_t value) { return from_bits<float>(uint32_t{value} << 16); }

// Whether the number comes from an accumulator whose product is under way; of either sign.
inline bool is_in_flight(uint32_t bits) { return (bits & 0x7FFFFFFFu) == kInFlightBits; }

// Both round to nearest even; NaN becomes 0x7FFF, as the cvt instruction makes it.
inline uint16_t float_to_half(float value) {
  const uint32_t bits = to_bits(value), sign = bits >> 16 & 0x8000u, size = bits & 0x7FFFFFFFu;
  if (size > 0x7F800000u) return 0x7FFFu;
  if (size >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7C00u);  // 65520 and more
  if (size < 0x38800000u) {  // below 2^-14: adding 1/2 leaves the multiple of 2^-24 in the last bits
    return static_cast<uint16_t>(sign | (to_bits(from_bits<float>(size) + 0.5f) - 0x3F000000u));
  }
  return static_cast<uint16_t>(sign | ((size + 0xFFFu + (size >> 13 & 1u) - 0x38000000u) >> 13));
}

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return 0x7FFFu;
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

// Sign, four bits of exponent with a bias of 7, three of mantissa.  The largest exponent is one of numbers too; only
// all ones is NaN.
inline float e4m3_to_float(uint8_t value) {
  const uint32_t sign = (uint32_t{value} & 0x80u) << 24, rest = uint32_t{value} & 0x7Fu;
  const uint32_t normal = (rest << 20) + (120u << 23);
  const uint32_t tiny = to_bits(static_cast<float>(static_cast<int32_t>(rest)) * 0x1p-9f);  // exact
  const uint32_t bits = rest < 0x08u ? tiny : rest < 0x7Fu ? normal : 0x7FC00000u;
  return from_bits<float>(bits | sign);
}

inline uint8_t float_to_e4m3(float value) {
  const uint32_t bits = to_bits(value), sign = bits >> 24 & 0x80u, size = bits & 0x7FFFFFFFu;
  if (size > 0x7F800000u) return 0x7Fu;
  if (size >= 0x43E00000u) return static_cast<uint8_t>(sign | 0x7Eu);  // 448 and more
  if (size < 0x3C800000u) {  // below 2^-6: adding 2^14 leaves the multiple of 2^-9 in the last bits
    return static_cast<uint8_t>(sign | (to_bits(from_bits<float>(size) + 0x1p14f) - 0x46800000u));
  }
  return static_cast<uint8_t>(sign | ((size + 0x7FFFFu + (size >> 20 & 1u) - 0x3C000000u) >> 20));
}

}  // namespace fastattn::cuda::sim
