// A float32 as a sum of bfloat16 operands, for machines whose bfloat16 products are so fast that several of them cost
// less than one of float32.  A piece is the top half of what the pieces before it left, the last one is rounded: two
// hold the 11 bits of a float16, three the 24 of a float32.  Tile products read denormals as zero, so of a number
// below 2^-110 the last bits are lost.
#pragma once

#include "gemm.h"

namespace fastattn::cpu::FASTATTN_ISA {

template <int kPieces>
FASTATTN_INLINE void split(Vec<float> x, Vec<float>* piece) {
#pragma GCC unroll 3
  for (int i = 0; i + 1 < kPieces; ++i) {
    piece[i] = (Vec<float>)((Vec<uint32_t>)x & 0xffff0000u);
    x -= piece[i];
  }
  piece[kPieces - 1] = x;
}

// The top halves of two vectors as pairs, a number of the first one in the low half: of pieces that need no rounding.
FASTATTN_INLINE Vec<uint32_t> pair_halves(Vec<float> low, Vec<float> high) {
  return ((Vec<uint32_t>)low >> 16) | ((Vec<uint32_t>)high & 0xffff0000u);
}

#if defined(FASTATTN_BF16_OPERANDS)
// Whether a piece is its top half, and needs no rounding: all but the last one, and of three also that, as three hold
// every bit of a float32.
template <int kPieces>
constexpr bool is_top_half(int piece) {
  return kPieces == 3 || piece + 1 < kPieces;
}

// The top halves of 32 numbers.
FASTATTN_INLINE __m512i top_halves(Vec<float> x, Vec<float> y) {
  alignas(64) static constexpr uint16_t kTop[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                                    33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16((__m512i)x, _mm512_load_si512(kTop), (__m512i)y);
}

// The pieces of 16 numbers, `apart` elements from each other.
template <int kPieces>
FASTATTN_INLINE void store_pieces(Vec<float> x, bf16* out, i64 apart) {
  Vec<float> piece[kPieces];
  split<kPieces>(x, piece);
#pragma GCC unroll 3
  for (int i = 0; i < kPieces; ++i)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * apart), (__m256i)_mm512_cvtneps_pbh((__m512)piece[i]));
}

// The same of 32 numbers: one conversion instead of two.
template <int kPieces>
FASTATTN_INLINE void store_pieces(Vec<float> x, Vec<float> y, bf16* out, i64 apart) {
  Vec<float> low[kPieces], high[kPieces];
  split<kPieces>(x, low);
  split<kPieces>(y, high);
#pragma GCC unroll 3
  for (int i = 0; i < kPieces; ++i)
    _mm512_storeu_si512(out + i * apart, is_top_half<kPieces>(i)
                                             ? top_halves(low[i], high[i])
                                             : (__m512i)_mm512_cvtne2ps_pbh((__m512)high[i], (__m512)low[i]));
}

// 32 columns of two rows, a and b, as a row of pairs, a number of the first one in the low half; the rows themselves as
// well if `low` is given.
template <int kPieces>
FASTATTN_INLINE void store_pairs(const float* a, const float* b, uint32_t* out, i64 apart, bf16* low = nullptr,
                                 bf16* high = nullptr, i64 low_apart = 0) {
  alignas(64) static constexpr uint16_t kAlternate[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i alternate = _mm512_load_si512(kAlternate);
  Vec<float> a0[kPieces], a1[kPieces], b0[kPieces], b1[kPieces];
  split<kPieces>(load(a), a0);
  split<kPieces>(load(a + 16), a1);
  split<kPieces>(load(b), b0);
  split<kPieces>(load(b + 16), b1);
#pragma GCC unroll 3
  for (int i = 0; i < kPieces; ++i) {
    __m512i pairs[2], rows[2];
    if (is_top_half<kPieces>(i)) {
      pairs[0] = (__m512i)pair_halves(a0[i], b0[i]), pairs[1] = (__m512i)pair_halves(a1[i], b1[i]);
      rows[0] = top_halves(a0[i], a1[i]), rows[1] = top_halves(b0[i], b1[i]);
    } else {
      const __m512i left = (__m512i)_mm512_cvtne2ps_pbh((__m512)b0[i], (__m512)a0[i]);
      const __m512i right = (__m512i)_mm512_cvtne2ps_pbh((__m512)b1[i], (__m512)a1[i]);
      pairs[0] = _mm512_permutexvar_epi16(alternate, left), pairs[1] = _mm512_permutexvar_epi16(alternate, right);
      rows[0] = _mm512_shuffle_i64x2(left, right, 0x44), rows[1] = _mm512_shuffle_i64x2(left, right, 0xee);
    }
    for (int half = 0; half < 2; ++half) _mm512_storeu_si512(out + i * apart + 16 * half, pairs[half]);
    if (low) {
      _mm512_storeu_si512(low + i * low_apart, rows[0]);
      _mm512_storeu_si512(high + i * low_apart, rows[1]);
    }
  }
}

#endif

}  // namespace fastattn::cpu::FASTATTN_ISA
