// The two kinds of matrix product in attention, on m16n8k16 tensor core instructions.
//
// A warp owns bands of 16 rows.  An accumulator s[band][n][r] of a lane is the element at row 16 * band + lane / 4 +
// 8 * (r / 2) and column 8 * n + 2 * (lane % 4) + r % 2: pairs of such accumulators, rounded to 16 bits, are the left
// operand of the next product as they stand.
#pragma once

#include <cmath>

#include "tile.h"

namespace fastattn::cuda {

template <int kBands, int kColumns>
FASTATTN_DEVICE void clear(float (&s)[kBands][kColumns][4]) {
  FASTATTN_UNROLL
  for (int band = 0; band < kBands; ++band) {
    FASTATTN_UNROLL
    for (int n = 0; n < kColumns; ++n) {
      FASTATTN_UNROLL
      for (int r = 0; r < 4; ++r) s[band][n][r] = 0.0f;
    }
  }
}

// s += A B^T: rows [row0, row0 + 16 * kBands) of tile A by all rows of tile B, over their common width.
template <class T, class TileA, class TileB, int kBands>
FASTATTN_DEVICE void add_product(float (&s)[kBands][TileB::kRows / 8][4], SharedAddress a, int row0, SharedAddress b) {
  static_assert(TileA::kDim == TileB::kDim);
  const int lane = lane_index();
  const SharedAddress a_lane = a + TileA::lane_part(row0 + (lane & 15), lane >> 4);
  const SharedAddress b_lane = b + TileB::lane_part((lane & 7) + (lane >> 4) * 8, (lane >> 3) & 1);
  FASTATTN_UNROLL
  for (int k = 0; k < TileA::kDim / 16; ++k) {
    uint32_t left[kBands][4];
    FASTATTN_UNROLL
    for (int band = 0; band < kBands; ++band)
      load_matrix_x4(left[band], TileA::at(a_lane, k) + band * 16 * TileA::kRowBytes);
    FASTATTN_UNROLL
    for (int n = 0; n < TileB::kRows / 16; ++n) {
      uint32_t right[4];
      load_matrix_x4(right, TileB::at(b_lane, k) + n * 16 * TileB::kRowBytes);
      FASTATTN_UNROLL
      for (int band = 0; band < kBands; ++band) {
        multiply_m16n8k16<T>(s[band][2 * n], left[band], right[0], right[1]);
        multiply_m16n8k16<T>(s[band][2 * n + 1], left[band], right[2], right[3]);
      }
    }
  }
}

// s = A B^T.
template <class T, class TileA, class TileB, int kBands>
FASTATTN_DEVICE void multiply_rows(float (&s)[kBands][TileB::kRows / 8][4], SharedAddress a, int row0,
                                   SharedAddress b) {
  clear(s);
  add_product<T, TileA, TileB>(s, a, row0, b);
}

// Accumulators as the left operand of a product over their columns.
template <class T, int kBands, int kColumns>
FASTATTN_DEVICE void pack_rows(uint32_t (&packed)[kBands][kColumns / 2][4], const float (&s)[kBands][kColumns][4]) {
  FASTATTN_UNROLL
  for (int band = 0; band < kBands; ++band) {
    FASTATTN_UNROLL
    for (int k = 0; k < kColumns / 2; ++k) {
      FASTATTN_UNROLL
      for (int r = 0; r < 4; ++r)
        packed[band][k][r] = pack2<T>(s[band][2 * k + r / 2][2 * (r % 2)], s[band][2 * k + r / 2][2 * (r % 2) + 1]);
    }
  }
}

// acc += P B: P (16 * kBands, rows of B) from registers by columns [16 * step0, 16 * step0 + 8 * kColumns) of tile B.
template <class T, class TileB, int kBands, int kColumns>
FASTATTN_DEVICE void accumulate(float (&acc)[kBands][kColumns][4], const uint32_t (&p)[kBands][TileB::kRows / 16][4],
                                SharedAddress b, int step0 = 0) {
  const int lane = lane_index();
  const SharedAddress b_lane = b + TileB::lane_part(lane & 15, lane >> 4);
  FASTATTN_UNROLL
  for (int k = 0; k < TileB::kRows / 16; ++k) {
    FASTATTN_UNROLL
    for (int n = 0; n < kColumns / 2; ++n) {
      uint32_t right[4];
      load_matrix_x4_transposed(right, TileB::at(b_lane, step0 + n) + k * 16 * TileB::kRowBytes);
      FASTATTN_UNROLL
      for (int band = 0; band < kBands; ++band) {
        multiply_m16n8k16<T>(acc[band][2 * n], p[band][k], right[0], right[1]);
        multiply_m16n8k16<T>(acc[band][2 * n + 1], p[band][k], right[2], right[3]);
      }
    }
  }
}

// Writes half a band of accumulators, times a factor, as rows of a 16-bit result (where `valid`; all lanes must call).
// Lanes trade columns first, so that the four that hold a row write 32 bytes of it at once.
template <class T, int kColumns>
FASTATTN_DEVICE void store_row(void* row, const float (&acc)[kColumns][4], int half, float factor, int column0, int dim,
                               bool valid) {
  const int part = lane_index() & 3, from = (lane_index() & ~3) + 2 * (part & 1);
  uint16_t* at = static_cast<uint16_t*>(row) + column0 + part * 4;
  FASTATTN_UNROLL
  for (int n = 0; n < kColumns; n += 2) {
    uint32_t mine[2], left[2], right[2];
    FASTATTN_UNROLL
    for (int k = 0; k < 2; ++k) {
      mine[k] = pack2<T>(acc[n + k][2 * half] * factor, acc[n + k][2 * half + 1] * factor);
      left[k] = shuffle(mine[k], from);
      right[k] = shuffle(mine[k], from + 1);
    }
    const Vec2 four = part < 2 ? Vec2{{left[0], right[0]}} : Vec2{{left[1], right[1]}};
    if (valid && column0 + n * 8 + part * 4 < dim) store_global(reinterpret_cast<Vec2*>(at + n * 8), four);
  }
}

// The sum, or the largest, over the four lanes that share a row.
FASTATTN_DEVICE float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
FASTATTN_DEVICE float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

}  // namespace fastattn::cuda
