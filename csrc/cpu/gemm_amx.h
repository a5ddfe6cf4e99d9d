// The AMX form of gemm for bfloat16 operands (see gemm.h for the layouts).
//
// A tile is 16 rows of 64 bytes.  One TDPBF16PS adds a 16 x 32 by 32 x 16 product to a 16 x 16 fp32 tile; blocks of
// 2 x 2 result tiles load four operand tiles for four products, which keeps the loads off the critical path.
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

// Rows [0, 16 * kM) and columns [0, 16 * kN) of C; b0 and b1 start at the two column blocks.
template <int kM, int kN>
inline void amx_block(i64 depth, const bf16* a, i64 a_row, const uint32_t* b0, const uint32_t* b1, i64 b_row, float* c,
                      i64 c_row, bool accumulate) {
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
  for (i64 k = 0; k < depth; k += 32) {
    _tile_loadd(6, b0 + k / 2 * b_row, b_bytes);
    _tile_loadd(4, a + k, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kN == 2) {
      _tile_loadd(7, b1 + k / 2 * b_row, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kM == 2) {
      _tile_loadd(5, a + 16 * a_row + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kN == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kN == 2) _tile_stored(1, c + 16, c_bytes);
  if constexpr (kM == 2) _tile_stored(2, c + 16 * c_row, c_bytes);
  if constexpr (kM == 2 && kN == 2) _tile_stored(3, c + 16 * c_row + 16, c_bytes);
}

template <int kPanel>
inline void amx_gemm(i64 m, i64 n, i64 depth, const bf16* a, i64 a_row, const uint32_t* b, i64 b_row, i64 b_panel,
                     float* c, i64 c_row, bool accumulate) {
  static_assert(kPanel % 32 == 0, "a pair of column tiles lies in one panel");
  for (i64 j = 0; j < n; j += 32) {
    const uint32_t* column = b + j / kPanel * b_panel + j % kPanel;
    for (i64 i = 0; i < m; i += 32) {
      const bf16* rows = a + i * a_row;
      float* target = c + i * c_row + j;
      if (i + 16 < m) {
        if (j + 16 < n)
          amx_block<2, 2>(depth, rows, a_row, column, column + 16, b_row, target, c_row, accumulate);
        else
          amx_block<2, 1>(depth, rows, a_row, column, column, b_row, target, c_row, accumulate);
      } else {
        if (j + 16 < n)
          amx_block<1, 2>(depth, rows, a_row, column, column + 16, b_row, target, c_row, accumulate);
        else
          amx_block<1, 1>(depth, rows, a_row, column, column, b_row, target, c_row, accumulate);
      }
    }
  }
}

}  // namespace fastattn::cpu::FASTATTN_ISA
