// The AMX form of gemm for bfloat16 operands (see gemm.h for the layouts).
//
// A tile is 16 rows of 64 bytes.  One TDPBF16PS adds a 16 x 32 by 32 x 16 product to a 16 x 16 fp32 tile.  Blocks of
// two results share a tile of B, and each tile of A is loaded into the same register: four registers in all.  Loads
// hide behind products, as with blocks of 2 x 2 in eight registers; but those become three times as slow whenever the
// core has few registers left to rename them to (README.md). Of the products of pieces those count whose share reaches
// the last piece's.
#pragma once

#include "convert.h"
#include "vec.h"

#if defined(FASTATTN_EMULATE_AMX)
#include "amx_emulated.h"
#endif

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

// Rows [0, 16 * kM) and columns [0, 16) of C.
template <int kM, int kPieces>
inline void amx_block(i64 depth, const bf16* a, i64 a_row, i64 a_piece, const uint32_t* b, i64 b_row, i64 b_piece,
                      float* c, i64 c_row, bool accumulate) {
  // Tile registers go on from what is there, so with S keys in a row the error of a sum would grow as S does.  Where
  // the result is worth it, this product is summed by itself.
  constexpr bool kApart = kPieces == 3;
  const i64 a_bytes = a_row * 2, b_bytes = b_row * 4, c_bytes = c_row * 4;
  if (accumulate && !kApart) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (kM == 2) _tile_loadd(1, c + 16 * c_row, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kM == 2) _tile_zero(1);
  }
  for (i64 k = 0; k < depth; k += 32, a += 32, b += 16 * b_row) {
#pragma GCC unroll 3
    for (int right = kPieces - 1; right >= 0; --right) {
      _tile_loadd(3, b + right * b_piece, b_bytes);
#pragma GCC unroll 3
      for (int left = kPieces - 1 - right; left >= 0; --left) {
        _tile_loadd(2, a + left * a_piece, a_bytes);
        _tile_dpbf16ps(0, 2, 3);
        if constexpr (kM == 2) {
          _tile_loadd(2, a + left * a_piece + 16 * a_row, a_bytes);
          _tile_dpbf16ps(1, 2, 3);
        }
      }
    }
  }
  if (accumulate && kApart) {
    alignas(64) float product[16 * kM][16];
    _tile_stored(0, product, 64);
    if constexpr (kM == 2) _tile_stored(1, product + 16, 64);
    for (int m = 0; m < 16 * kM; ++m, c += c_row) store(c, load(c) + load(product[m]));
    return;
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kM == 2) _tile_stored(1, c + 16 * c_row, c_bytes);
}

// Columns [j, j + 16) of C, all rows.
template <int kPanel, int kPieces>
FASTATTN_INLINE void amx_columns(i64 j, i64 m, i64 depth, const bf16* a, i64 a_row, i64 a_piece, const uint32_t* b,
                                 i64 b_row, i64 b_panel, i64 b_piece, float* c, i64 c_row, bool accumulate) {
  static_assert(kPanel % 16 == 0, "a tile of columns lies in one panel");
  b += j / kPanel * b_panel + j % kPanel;
  c += j;
  for (; m > 16; m -= 32, a += 32 * a_row, c += 32 * c_row)
    amx_block<2, kPieces>(depth, a, a_row, a_piece, b, b_row, b_piece, c, c_row, accumulate);
  if (m > 0) amx_block<1, kPieces>(depth, a, a_row, a_piece, b, b_row, b_piece, c, c_row, accumulate);
}

template <int kPanel, int kPieces>
inline void amx_gemm(i64 m, i64 n, i64 depth, const bf16* a, i64 a_row, i64 a_piece, const uint32_t* b, i64 b_row,
                     i64 b_panel, i64 b_piece, float* c, i64 c_row, bool accumulate) {
  for (i64 j = 0; j < n; j += 16)
    amx_columns<kPanel, kPieces>(j, m, depth, a, a_row, a_piece, b, b_row, b_panel, b_piece, c, c_row, accumulate);
}

}  // namespace fastattn::cpu::FASTATTN_ISA
