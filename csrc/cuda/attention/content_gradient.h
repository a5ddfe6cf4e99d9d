// Gradients of row and column tables: sums of dS over the keys (queries) of a row (key) that read the same column.
//
// A warp owns its rows, so their sums stay in memory, where it alone adds to them: nothing of (Sq, Sk), or as wide as
// the tables' reach, is held anywhere.  Along a row columns only rise (only fall): pairs that share one lie side by
// side, and are summed over lanes before memory is touched.
#pragma once

#include "../arch/overlap.h"
#include "scores.h"

namespace fastattn::cuda {

// Zeroes rows of a matrix, shared by the threads of a block.
template <int kThreads>
FASTATTN_DEVICE void clear_block(float* data, i64 stride, int rows, int columns) {
  for (int row = warp_index(); row < rows; row += kThreads / 32)
    for (int column = lane_index(); column < columns; column += 32) store_global(data + row * stride + column, 0.0f);
}

// Adds dS of a tile to `grad`, (Sq, C) of one query head, or (C, Sk) of one key head where tiles are transposed.  Lanes
// give way to each other by barriers of the warp here, and of the block from one tile to the next.
template <class Place, int kColumns>
FASTATTN_DEVICE void add_to_table(const float (&ds)[1][kColumns][4], const Attention& p, const Interval& v,
                                  const Place& at, Side side, float* grad) {
  const ContentTables& t = p.content;
  const int lane = thread_index_again() % kWarpSize, rows = Place::kTransposed ? p.key_length : p.query_length;
  const auto place_of = [&](int row, int column) {
    return Place::kTransposed ? grad + static_cast<i64>(column) * p.key_length + row
                              : grad + static_cast<i64>(row) * (t.last + 1) + column;
  };
  if (side != Side::kNear) {
    const int column = far_column(t, side);
    FASTATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      float sum = 0.0f;
      FASTATTN_UNROLL
      for (int n = 0; n < kColumns; ++n) sum += ds[0][n][2 * half] + ds[0][n][2 * half + 1];
      sum = quad_sum(sum);
      const int row = at.row_at(0, 2 * half);
      if ((lane & 3) == 0 && row < rows) {
        float* const to = place_of(row, column);
        store_global(to, load_global(to) + sum);
      }
    }
    return;
  }
  // Eight columns of the tile at a time: a lane then holds column lane % 8 of rows lane / 8, + 4, + 8 and + 12.
  const int column = lane % 8;
  FASTATTN_NO_UNROLL
  for (int n = 0; n < kColumns; ++n) {
    const int across = at.column - 2 * (lane & 3) + 8 * n + column;
    float sum[4], before[4];
    float* to[4];
    FASTATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      float piece[2] = {0.0f, 0.0f};
      FASTATTN_UNROLL
      for (int m = 0; m < kColumns; ++m) {
        FASTATTN_UNROLL
        for (int r = 0; r < 2; ++r) piece[r] = m == n ? ds[0][m][2 * half + r] : piece[r];
      }
      const int row0 = at.row_at(0, 2 * half) - lane / 4 + lane / 8;
      int own[2];
      FASTATTN_UNROLL
      for (int k = 0; k < 2; ++k) {
        const int row = row0 + 4 * k;
        own[k] = Place::kTransposed ? row - (across + v.offset) : across - (row + v.offset);
      }
      find_columns(own, t);
      FASTATTN_UNROLL
      for (int k = 0; k < 2; ++k) {
        const int from = 16 * k + lane / 8 * 4 + column / 2;
        const float even = shuffle(piece[0], from), odd = shuffle(piece[1], from);
        sum[2 * half + k] = column % 2 ? odd : even;
        FASTATTN_UNROLL
        for (int step = 1; step < 8; step *= 2) {
          const float below = shuffle_up(sum[2 * half + k], step);
          const int column_below = shuffle_up(own[k], step);
          if (column >= step && column_below == own[k]) sum[2 * half + k] += below;
        }
        const bool last = shuffle_down(own[k], 1) != own[k] || column == 7;
        to[2 * half + k] = last && row0 + 4 * k < rows ? place_of(row0 + 4 * k, own[k]) : nullptr;
      }
    }
    FASTATTN_UNROLL
    for (int k = 0; k < 4; ++k) before[k] = to[k] ? load_global(to[k]) : 0.0f;
    FASTATTN_UNROLL
    for (int k = 0; k < 4; ++k)
      if (to[k]) store_global(to[k], before[k] + sum[k]);
    sync_warp();
  }
}

}  // namespace fastattn::cuda
