// The threads that share a row: which columns each of them holds, and sums and maxima over all of them.
//
// A row belongs to one, two, four or all eight warps of its block.  Thread g of G holds, of a tile of columns,
// `kChunks` chunks of as many elements as 16 bytes hold: neighbours in the wide layout, G apart in the other, so that
// either way the lanes of a warp read memory that lies together.
#pragma once

#include "elements.h"
#include "params.h"

namespace fastattn::cuda {

inline constexpr int kRowThreads = 256;
inline constexpr int kRowWarps = kRowThreads / kWarpSize;

template <class T, int kChunks>
struct Columns {
  int first, chunk_step, element_step;
  int tile;  // columns of one

  FASTATTN_DEVICE Columns(int warps_per_row, bool wide) {
    const int threads = warps_per_row * kWarpSize, mine = thread_index() % threads;
    first = wide ? mine * kWide<T> : mine;
    chunk_step = threads * kWide<T>;
    element_step = wide ? 1 : threads;
    tile = kChunks * chunk_step;
  }

  // The first column of a chunk.
  FASTATTN_DEVICE int chunk(int n, int c) const { return n * tile + c * chunk_step + first; }
};

// Columns [lo, hi) of one row of a tensor.
struct Visible {
  int lo, hi;

  FASTATTN_DEVICE bool sees(int j) const { return j >= lo && j < hi; }
  FASTATTN_DEVICE bool sees_some(int first, int last) const { return last >= lo && first < hi; }
};

// The bits of a chunk.  Columns that are not seen are not read in the narrow layout; what comes of them has no meaning.
template <class T>
FASTATTN_DEVICE Vec4 load_chunk(const Stored<T>* row, int column, int step, bool wide, const Visible& visible) {
  Vec4 raw = {};
  if (wide) {
    if (visible.sees_some(column, column + kWide<T> - 1))
      raw = load_constant(reinterpret_cast<const Vec4*>(row + column));
  } else {
    FASTATTN_UNROLL
    for (int e = 0; e < kWide<T>; ++e) {
      const int j = column + e * step;
      Stored<T> value = {};
      if (visible.sees(j)) value = load_constant(row + j);
      if constexpr (sizeof(Stored<T>) == 4) {
        raw.x[e] = bits_of(value);
      } else {
        raw.x[e / 2] |= static_cast<uint32_t>(value) << (16 * (e % 2));
      }
    }
  }
  return raw;
}

template <class T>
FASTATTN_DEVICE void store_chunk(Stored<T>* row, int column, int step, bool wide, int length,
                                 const float (&values)[kWide<T>]) {
  if (wide) {
    if (column < length) store_wide<T>(row + column, narrow<T>(values));
  } else {
    FASTATTN_UNROLL
    for (int e = 0; e < kWide<T>; ++e)
      if (column + e * step < length) store_global(row + column + e * step, narrow<T>(values[e]));
  }
}

FASTATTN_DEVICE float warp_max(float x) {
  FASTATTN_UNROLL
  for (int step = kWarpSize / 2; step; step /= 2) x = fmaxf(x, shuffle_xor(x, step));
  return x;
}

FASTATTN_DEVICE float warp_sum(float x) {
  FASTATTN_UNROLL
  for (int step = kWarpSize / 2; step; step /= 2) x += shuffle_xor(x, step);
  return x;
}

// Sums over the threads of a row, in the same order for each of them.  All threads of the block come here together.
template <int kCount>
FASTATTN_DEVICE void row_sums(float (&x)[kCount], int warps_per_row) {
  FASTATTN_UNROLL
  for (int n = 0; n < kCount; ++n) x[n] = warp_sum(x[n]);
  if (warps_per_row == 1) return;
  const int warp = warp_index(), first = warp / warps_per_row * warps_per_row;
  sync_block();
  if (lane_index() == 0) FASTATTN_UNROLL
  for (int n = 0; n < kCount; ++n) store_shared(shared_base() + 4 * (n * kRowWarps + warp), x[n]);
  sync_block();
  FASTATTN_UNROLL
  for (int n = 0; n < kCount; ++n) {
    x[n] = 0;
    for (int w = 0; w < warps_per_row; ++w) x[n] += load_shared<float>(shared_base() + 4 * (n * kRowWarps + first + w));
  }
}

inline constexpr int kRowSharedBytes = 4 * 4 * kRowWarps;  // of four sums at most

// Which row a thread works on, and where it lies.
struct RowPlace {
  int b, h, i;
  bool exists;

  FASTATTN_DEVICE RowPlace(const Attention& p, int rows, int warps_per_row) {
    const int index = block_index() * (kRowWarps / warps_per_row) + warp_index() / warps_per_row;
    exists = index < rows;
    const int row = exists ? index : 0;
    i = row % p.query_length;
    h = row / p.query_length % p.heads;
    b = row / p.query_length / p.heads;
  }

  template <class T>
  FASTATTN_DEVICE Stored<T>* of(const Rows& rows) const {
    return static_cast<Stored<T>*>(rows.data) + b * rows.batch + h * rows.head + i * rows.row;
  }
};

}  // namespace fastattn::cuda
