// The AMX form of gemm for bfloat16 operands (see gemm.h for the layouts).
//
// A tile is 16 rows of 64 bytes.  One TDPBF16PS adds a 16 x 32 by 32 x 16 product to a 16 x 16 fp32 tile; blocks of
// 2 x 2 result tiles load four operand tiles for four products, which keeps the loads off the critical path.
// Of the products of pieces those count whose share reaches the last piece's.
#pragma once

#include "convert.h"
#include "vec.h"

namespace fastattn::cpu::FASTATTN_ISA {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

// In static memory: GCC tells the optimiser that the instruction reads eight bytes, and drops the stores to the rest
// of a local.
static constexpr TileConfig kTileConfig;

FASTATTN_INLINE void amx_configure() { _tile_loadconfig(&kTileConfig); }

// Which pieces of A and B meet, in an order where each pair shares one with the pair before it, so that only the other
// one has to be loaded.
struct PiecePair {
  int a, b;
};
template <int kPieces>
constexpr PiecePair kPiecePairs[] = {{0, 0}};
template <>
constexpr PiecePair kPiecePairs<2>[] = {{1, 0}, {0, 0}, {0, 1}};
template <>
constexpr PiecePair kPiecePairs<3>[] = {{2, 0}, {1, 0}, {1, 1}, {0, 1}, {0, 0}, {0, 2}};

// Rows [0, 16 * kM) and columns [0, 16 * kN) of C.
template <int kM, int kN, int kPieces>
inline void amx_block(i64 depth, const bf16* a, i64 a_row, i64 a_piece, const uint32_t* b, i64 b_row, i64 b_piece,
                      float* c, i64 c_row, bool accumulate) {
  const i64 a_bytes = a_row * 2, b_bytes = b_row * 4, c_bytes = c_row * 4;
  if (accumulate) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (kN == 2) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (kM == 2) _tile_loadd(2, c + 16 * c_row, c_bytes);
    if constexpr (kM == 2 && kN == 2) _tile_loadd(3, c + 16 * c_row + 16, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kN == 2) _tile_zero(1);
    if constexpr (kM == 2) _tile_zero(2);
    if constexpr (kM == 2 && kN == 2) _tile_zero(3);
  }
  for (i64 k = 0; k < depth; k += 32, a += 32, b += 16 * b_row) {
    PiecePair before{-1, -1};
#pragma GCC unroll 6
    for (const PiecePair pair : kPiecePairs<kPieces>) {
      const bf16* const left = a + pair.a * a_piece;
      const uint32_t* const right = b + pair.b * b_piece;
      if (pair.b != before.b) _tile_loadd(6, right, b_bytes);
      if (pair.a != before.a) _tile_loadd(4, left, a_bytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kN == 2) {
        if (pair.b != before.b) _tile_loadd(7, right + 16, b_bytes);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (kM == 2) {
        if (pair.a != before.a) _tile_loadd(5, left + 16 * a_row, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (kN == 2) _tile_dpbf16ps(3, 5, 7);
      }
      before = pair;
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kN == 2) _tile_stored(1, c + 16, c_bytes);
  if constexpr (kM == 2) _tile_stored(2, c + 16 * c_row, c_bytes);
  if constexpr (kM == 2 && kN == 2) _tile_stored(3, c + 16 * c_row + 16, c_bytes);
}

template <int kPanel, int kPieces>
inline void amx_gemm(i64 m, i64 n, i64 depth, const bf16* a, i64 a_row, i64 a_piece, const uint32_t* b, i64 b_row,
                     i64 b_panel, i64 b_piece, float* c, i64 c_row, bool accumulate) {
  static_assert(kPanel % 32 == 0, "a pair of column tiles lies in one panel");
  for (i64 j = 0; j < n; j += 32) {
    const uint32_t* column = b + j / kPanel * b_panel + j % kPanel;
    for (i64 i = 0; i < m; i += 32) {
      const auto block = [&]<int kM, int kN>(std::integer_sequence<int, kM, kN>) {
        amx_block<kM, kN, kPieces>(depth, a + i * a_row, a_row, a_piece, column, b_row, b_piece, c + i * c_row + j,
                                   c_row, accumulate);
      };
      const bool two_rows = i + 16 < m, two_columns = j + 16 < n;
      if (two_rows && two_columns)
        block(std::integer_sequence<int, 2, 2>{});
      else if (two_rows)
        block(std::integer_sequence<int, 2, 1>{});
      else if (two_columns)
        block(std::integer_sequence<int, 1, 2>{});
      else
        block(std::integer_sequence<int, 1, 1>{});
    }
  }
}

}  // namespace fastattn::cpu::FASTATTN_ISA
