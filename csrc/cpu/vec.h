// A thin vector type over GCC vector extensions.  The width follows the instruction set the file is compiled
// for; intrinsics appear only where the extension cannot say the operation.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "../common/problem.h"

#ifndef FASTATTN_ISA
#error "compile with -DFASTATTN_ISA=<name>: each instruction set lives in its own namespace"
#endif

namespace fastattn::cpu::FASTATTN_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kVectorRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32, kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16, kVectorRegisters = 16;
#endif

template <class T>
struct VectorTypes {
  typedef T aligned __attribute__((vector_size(kVectorBytes)));
  typedef T loose __attribute__((vector_size(kVectorBytes), aligned(sizeof(T)), may_alias));
};

template <class T>
using Vec = typename VectorTypes<T>::aligned;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// min/max/rounding of our own: std:: templates compiled here with wide instructions could be the copy the linker
// keeps for the whole library.
template <class T>
FASTATTN_INLINE constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
FASTATTN_INLINE constexpr T larger(T a, T b) {
  return a < b ? b : a;
}
FASTATTN_INLINE i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
FASTATTN_INLINE i64 round_up(i64 a, i64 b) { return (a + b - 1) / b * b; }
FASTATTN_INLINE i64 round_down(i64 a, i64 b) { return a / b * b; }

template <class T>
FASTATTN_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VectorTypes<T>::loose*>(p);
}
// Lanes [first, last) from p, `stride` apart, the others from elsewhere.
template <class T>
FASTATTN_INLINE Vec<T> load_lanes(const T* p, i64 stride, i64 first, i64 last, Vec<T> others) {
#if defined(__AVX512F__)
  if (stride == 1) {
    const uint32_t lanes = (1u << last) - (1u << first);
    if constexpr (sizeof(T) == 4)
      return (Vec<T>)_mm512_mask_loadu_ps((__m512)others, static_cast<__mmask16>(lanes), p);
    else
      return (Vec<T>)_mm512_mask_loadu_pd((__m512d)others, static_cast<__mmask8>(lanes), p);
  }
#endif
  for (i64 k = first; k < last; ++k) others[k] = p[k * stride];
  return others;
}
template <class T>
FASTATTN_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorTypes<T>::loose*>(p) = v;
}
template <class T>
FASTATTN_INLINE Vec<T> splat(T x) {
  return x - Vec<T>{};  // x - 0 is x for every x, so this folds into a broadcast
}

// vmax(a, b): b where either is NaN, as the machine instruction does.
FASTATTN_INLINE Vec<float> vmax(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX__)
  return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (Vec<float>)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
FASTATTN_INLINE Vec<double> vmax(Vec<double> a, Vec<double> b) { return a > b ? a : b; }

// |a|, whose sign bit is all that differs.
template <class T>
FASTATTN_INLINE Vec<T> magnitude(Vec<T> a) {
  using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
  return (Vec<T>)((Vec<Bits>)a & (~Bits{0} >> 1));
}

// 0, 1, 2, ...
template <class T, int... kLane>
FASTATTN_INLINE Vec<T> lane_numbers(std::integer_sequence<int, kLane...>) {
  return Vec<T>{static_cast<T>(kLane)...};
}
template <class T>
FASTATTN_INLINE Vec<T> lane_numbers() {
  return lane_numbers<T>(std::make_integer_sequence<int, kLanes<T>>{});
}

template <class T>
FASTATTN_INLINE T reduce_max(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_max_ps((__m512)v);
#endif
  T best = v[0];
  for (int i = 1; i < kLanes<T>; ++i) best = larger(best, T{v[i]});
  return best;
}

// Whether any lane is above the limit.
template <class T>
FASTATTN_INLINE bool any_above(Vec<T> v, T limit) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask((__m512)v, _mm512_set1_ps(limit), _CMP_GT_OQ) != 0;
#endif
  return reduce_max<T>(v) > limit;
}

template <class T>
FASTATTN_INLINE T reduce_add(Vec<T> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_reduce_add_ps((__m512)v);
#endif
  T parts[kLanes<T>];
  store(parts, v);
  for (int width = kLanes<T> / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
}

// a0 b0 a1 b1 ...: two vectors, at `first` and `second`.
template <class T, int... kLane>
FASTATTN_INLINE void interleave_lanes(Vec<T> a, Vec<T> b, T* first, T* second, std::integer_sequence<int, kLane...>) {
  using Index = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  constexpr int n = kLanes<T>;
  const Vec<Index> low = {static_cast<Index>(kLane / 2 + (kLane & 1) * n)...};
  const Vec<Index> high = {static_cast<Index>(kLane / 2 + n / 2 + (kLane & 1) * n)...};
  store(first, (Vec<T>)__builtin_shuffle(a, b, low));
  store(second, (Vec<T>)__builtin_shuffle(a, b, high));
}
template <class T>
FASTATTN_INLINE void interleave(Vec<T> a, Vec<T> b, T* first, T* second) {
  interleave_lanes<T>(a, b, first, second, std::make_integer_sequence<int, kLanes<T>>{});
}

// The reverse: what is in even places of a and b, one after the other, to a; what is in odd ones to b.
template <class T, int... kLane>
FASTATTN_INLINE void deinterleave_lanes(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, kLane...>) {
  using Index = Vec<std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  const Index even = {(2 * kLane)...}, odd = {(2 * kLane + 1)...};
  const Vec<T> first = a, second = b;
  a = (Vec<T>)__builtin_shuffle(first, second, even);
  b = (Vec<T>)__builtin_shuffle(first, second, odd);
}
template <class T>
FASTATTN_INLINE void deinterleave(Vec<T>& a, Vec<T>& b) {
  deinterleave_lanes<T>(a, b, std::make_integer_sequence<int, kLanes<T>>{});
}

// The product of the low halves of each 64-bit element, in full.
FASTATTN_INLINE Vec<uint64_t> multiply_low_halves(Vec<uint64_t> a, Vec<uint64_t> b) {
#if defined(__AVX512F__)
  return (Vec<uint64_t>)_mm512_mul_epu32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Vec<uint64_t>)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  return (Vec<uint64_t>)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Results too small for a normal number become zero while this lives.  Weights far below the largest one times small
// values would otherwise be denormal, and every multiply-add with one costs a microcode assist of a hundred cycles and
// more (ALiBi's far keys did that).  Denormal inputs are still read as what they are.
struct FlushScope {
#if defined(__SSE2__)
  FlushScope() : before(_mm_getcsr()) { _mm_setcsr(before | 0x8000u); }
  ~FlushScope() { _mm_setcsr(before); }
  unsigned before;
#else
  FlushScope() {}
#endif
  FlushScope(const FlushScope&) = delete;
  FlushScope& operator=(const FlushScope&) = delete;
};

// In-register transpose of a square block: log2(lanes) stages that swap off-diagonal halves.
template <class T, int kStage, int... kLane>
FASTATTN_INLINE void transpose_stage(Vec<T>* rows, std::integer_sequence<int, kLane...>) {
  using Index = Vec<std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;
  constexpr int n = kLanes<T>;
  const Index low = {((kLane & kStage) ? n + kLane - kStage : kLane)...};
  const Index high = {((kLane & kStage) ? n + kLane : kLane + kStage)...};
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i) {
    if (i & kStage) continue;
    const Vec<T> a = rows[i], b = rows[i + kStage];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + kStage] = __builtin_shuffle(a, b, high);
  }
}

template <class T, int kStage = kLanes<T> / 2>
FASTATTN_INLINE void transpose(Vec<T>* rows) {
  transpose_stage<T, kStage>(rows, std::make_integer_sequence<int, kLanes<T>>{});
  if constexpr (kStage > 1) transpose<T, kStage / 2>(rows);
}

// Lane k of the result joins the lanes of rows[k], which may change places: where the transpose shuffles twice, this
// leaves one half of each where it is.
template <class T, int kStage, class Join, int... kLane>
FASTATTN_INLINE void join_stage(Vec<T>* rows, Join join, std::integer_sequence<int, kLane...>) {
  using Index = Vec<std::conditional_t<sizeof(T) == 4, int32_t, int64_t>>;
  constexpr int n = kLanes<T>;
  const Index stay = {((kLane & kStage) ? n + kLane : kLane)...};
  const Index move = {((kLane & kStage) ? n + kLane - kStage : kLane + kStage)...};
#pragma GCC unroll 16
  for (int i = 0; i < kStage; ++i)
    rows[i] =
        join(__builtin_shuffle(rows[i], rows[i + kStage], stay), __builtin_shuffle(rows[i], rows[i + kStage], move));
}

template <class T, int kStage = kLanes<T> / 2, class Join>
FASTATTN_INLINE Vec<T> join_lanes(Vec<T>* rows, Join join) {
  join_stage<T, kStage>(rows, join, std::make_integer_sequence<int, kLanes<T>>{});
  if constexpr (kStage > 1) return join_lanes<T, kStage / 2>(rows, join);
  return rows[0];
}

template <class T>
FASTATTN_INLINE Vec<T> add_lanes(Vec<T>* rows) {
  return join_lanes<T>(rows, [](Vec<T> a, Vec<T> b) { return a + b; });
}
template <class T>
FASTATTN_INLINE Vec<T> max_lanes(Vec<T>* rows) {
  return join_lanes<T>(rows, [](Vec<T> a, Vec<T> b) { return vmax(a, b); });
}

}  // namespace fastattn::cpu::FASTATTN_ISA
