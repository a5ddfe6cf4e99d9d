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
    _mm512_storeu_si512(out + i * apart, (__m512i)_mm512_cvtne2ps_pbh((__m512)high[i], (__m512)low[i]));
}

// Two rows of 16 numbers as one row of pairs, a number of the first one in the low half; the rows themselves as well
// if `low` is given.
template <int kPieces>
FASTATTN_INLINE void store_pairs(Vec<float> a, Vec<float> b, uint32_t* out, i64 apart, bf16* low = nullptr,
                                 bf16* high = nullptr, i64 low_apart = 0) {
  alignas(64) static constexpr uint16_t kAlternate[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i alternate = _mm512_load_si512(kAlternate);
  Vec<float> first[kPieces], second[kPieces];
  split<kPieces>(a, first);
  split<kPieces>(b, second);
#pragma GCC unroll 3
  for (int i = 0; i < kPieces; ++i) {
    const __m512i rows = (__m512i)_mm512_cvtne2ps_pbh((__m512)second[i], (__m512)first[i]);
    if (low) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(low + i * low_apart), _mm512_castsi512_si256(rows));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(high + i * low_apart), _mm512_extracti64x4_epi64(rows, 1));
    }
    _mm512_storeu_si512(out + i * apart, _mm512_permutexvar_epi16(alternate, rows));
  }
}

#endif

}  // namespace fastattn::cpu::FASTATTN_ISA
