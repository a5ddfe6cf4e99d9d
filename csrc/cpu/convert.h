// Rows of any dtype to and from the compute type.
#pragma once

#include <cstring>

#include "vec.h"

namespace fastattn::cpu::FASTATTN_ISA {

using bf16 = uint16_t;  // storage only

FASTATTN_INLINE float bf16_to_float(bf16 h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// Round to nearest even; a NaN stays a NaN.
FASTATTN_INLINE bf16 float_to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<bf16>(f == f ? rounded : 0x7fc0u);
}

FASTATTN_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fffu) << 13;
  float f;
  std::memcpy(&f, &magnitude, 4);
  f *= 0x1p112f;  // moves the exponent bias from 15 to 127, denormals included
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  bits = magnitude >= 0x0f800000u ? (magnitude | 0x7f800000u) : bits;  // infinity and NaN
  bits |= sign;
  std::memcpy(&f, &bits, 4);
  return f;
}

FASTATTN_INLINE uint16_t float_to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t result;
  if (magnitude > 0x7f800000u) {
    result = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {
    result = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // half denormal: let the float adder round at bit 2^-24
    float x;
    std::memcpy(&x, &magnitude, 4);
    x += 0.5f;
    std::memcpy(&result, &x, 4);
    result -= 0x3f000000u;
  } else {
    result = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return static_cast<uint16_t>(sign | result);
}

// Reads n elements `stride` apart, as T.
template <class T>
inline void load_row(DType type, const char* source, i64 stride, i64 n, T* out) {
  switch (type) {
    case DType::kFloat32: {
      const float* p = reinterpret_cast<const float*>(source);
      if (stride == 1)
        for (i64 i = 0; i < n; ++i) out[i] = static_cast<T>(p[i]);
      else
        for (i64 i = 0; i < n; ++i) out[i] = static_cast<T>(p[i * stride]);
      return;
    }
    case DType::kFloat64: {
      const double* p = reinterpret_cast<const double*>(source);
      for (i64 i = 0; i < n; ++i) out[i] = static_cast<T>(p[i * stride]);
      return;
    }
    case DType::kBFloat16: {
      const bf16* p = reinterpret_cast<const bf16*>(source);
      if (stride == 1)
        for (i64 i = 0; i < n; ++i) out[i] = bf16_to_float(p[i]);
      else
        for (i64 i = 0; i < n; ++i) out[i] = bf16_to_float(p[i * stride]);
      return;
    }
    case DType::kFloat16: {
      const uint16_t* p = reinterpret_cast<const uint16_t*>(source);
      i64 i = 0;
#if defined(__AVX512F__)
      if constexpr (sizeof(T) == 4)
        if (stride == 1)
          for (; i + 16 <= n; i += 16)
            _mm512_storeu_ps(out + i, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i))));
#elif defined(__F16C__)
      if constexpr (sizeof(T) == 4)
        if (stride == 1)
          for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i))));
#endif
      for (; i < n; ++i) out[i] = half_to_float(p[i * stride]);
      return;
    }
    case DType::kBool:
    case DType::kInt32:
    case DType::kInt64:
      return;
  }
}

template <class T>
inline void round_to_bf16(const T* in, i64 n, bf16* out) {
  i64 i = 0;
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 4)
    for (; i + 16 <= n; i += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(in + i)));
#endif
  for (; i < n; ++i) out[i] = float_to_bf16(static_cast<float>(in[i]));
}

// Writes n elements into a row with unit stride.
template <class T>
inline void store_row(DType type, const T* in, i64 n, char* target) {
  switch (type) {
    case DType::kFloat32: {
      float* p = reinterpret_cast<float*>(target);
      for (i64 i = 0; i < n; ++i) p[i] = static_cast<float>(in[i]);
      return;
    }
    case DType::kFloat64: {
      double* p = reinterpret_cast<double*>(target);
      for (i64 i = 0; i < n; ++i) p[i] = static_cast<double>(in[i]);
      return;
    }
    case DType::kBFloat16:
      round_to_bf16(in, n, reinterpret_cast<bf16*>(target));
      return;
    case DType::kFloat16: {
      uint16_t* p = reinterpret_cast<uint16_t*>(target);
      i64 i = 0;
#if defined(__AVX512F__)
      if constexpr (sizeof(T) == 4)
        for (; i + 16 <= n; i += 16)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + i),
                              _mm512_cvtps_ph(_mm512_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
      if constexpr (sizeof(T) == 4)
        for (; i + 8 <= n; i += 8)
          _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i),
                           _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
#endif
      for (; i < n; ++i) p[i] = float_to_half(static_cast<float>(in[i]));
      return;
    }
    case DType::kBool:
    case DType::kInt32:
    case DType::kInt64:
      return;
  }
}

// The same of in * scale, for whole vectors of the usual types; false, with nothing written, for the others.
template <class T>
FASTATTN_INLINE bool store_scaled(DType type, const T* in, T scale, i64 n, char* target) {
  constexpr DType own = sizeof(T) == 4 ? DType::kFloat32 : DType::kFloat64;
  if (n % kLanes<T>) return false;
  if (type == own) {
    for (i64 i = 0; i < n; i += kLanes<T>) store(reinterpret_cast<T*>(target) + i, load(in + i) * scale);
    return true;
  }
#if defined(__AVX512BF16__)
  if constexpr (sizeof(T) == 4)
    if (type == DType::kBFloat16) {
      for (i64 i = 0; i < n; i += kLanes<T>)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(target + 2 * i),
                            (__m256i)_mm512_cvtneps_pbh((__m512)(load(in + i) * scale)));
      return true;
    }
#endif
  return false;
}

// Whether all n values are finite: the exponent field is nowhere all ones.
inline bool all_finite(const float* row, i64 n) {
  uint32_t bad = 0;
  for (i64 i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, row + i, 4);
    bad |= static_cast<uint32_t>((bits & 0x7f800000u) == 0x7f800000u);
  }
  return bad == 0;
}
inline bool all_finite(const double* row, i64 n) {
  uint64_t bad = 0;
  for (i64 i = 0; i < n; ++i) {
    uint64_t bits;
    std::memcpy(&bits, row + i, 8);
    bad |= static_cast<uint64_t>((bits & 0x7ff0000000000000ull) == 0x7ff0000000000000ull);
  }
  return bad == 0;
}

template <class T>
FASTATTN_INLINE T read_scalar(const View& view, i64 a, i64 b = 0, i64 c = 0, i64 d = 0) {
  T value = 0;
  load_row<T>(view.dtype, view.at(a, b, c, d), 1, 1, &value);
  return value;
}

// One vector of numbers from memory of any kind.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
#if defined(__F16C__)
constexpr bool kLoadsHalf = true;
#else
constexpr bool kLoadsHalf = false;  // load_row converts element by element
#endif

template <class T>
FASTATTN_INLINE Vec<T> load_numbers(const T* p) {
  return load(p);
}
FASTATTN_INLINE Vec<float> load_numbers(const BFloat16* p) {
#if defined(__AVX512F__)
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
#elif defined(__AVX2__)
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16);
#else
  Vec<uint32_t> bits;
  for (int i = 0; i < kLanes<float>; ++i) bits[i] = static_cast<uint32_t>(p[i].bits) << 16;
  return (Vec<float>)bits;
#endif
}
// Two vectors of them, those in even places and those in odd ones: an operation each, where load_numbers takes two.
FASTATTN_INLINE void load_even_and_odd(const BFloat16* p, Vec<float>& even, Vec<float>& odd) {
  const Vec<uint32_t> pairs = load(reinterpret_cast<const uint32_t*>(p));
  even = (Vec<float>)(pairs << 16);
  odd = (Vec<float>)(pairs & 0xffff0000u);
}
FASTATTN_INLINE Vec<float> load_numbers(const Half* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> x;
  for (int i = 0; i < kLanes<float>; ++i) x[i] = half_to_float(p[i].bits);
  return x;
#endif
}

}  // namespace fastattn::cpu::FASTATTN_ISA
