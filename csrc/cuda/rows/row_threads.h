// The threads that share a row: which columns each of them holds, and sums and maxima over all of them.
//
// A row belongs to G threads of its block, a power of two up to all 256; short rows share a warp.  Thread g of G holds,
// of a tile of columns, `kChunks` chunks of as many elements as 16 bytes hold: neighbours in the wide layout, G apart
// in the other, so that either way lanes beside each other read memory that lies together.
#pragma once

#include "../features/geometry.h"
#include "elements.h"
#include "params.h"

namespace fastattn::cuda {

inline constexpr int kRowThreads = 256;
inline constexpr int kRowWarps = kRowThreads / kWarpSize;

// The columns of a thread.  Steps stay in the parameters: instructions take them from there without a register.
template <class T, int kChunks>
struct Columns {
  const RowDeal& deal;
  int first;

  FASTATTN_DEVICE explicit Columns(const RowDeal& how)
      : deal(how), first(thread_index() % how.threads * how.thread_step) {}

  FASTATTN_DEVICE int step() const { return deal.element_step; }
  // The first column of a chunk.
  FASTATTN_DEVICE int chunk(int tile, int c) const { return (tile * kChunks + c) * deal.threads * kWide<T> + first; }
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

// Over the lanes of a warp that share a row.
FASTATTN_DEVICE float lanes_max(float x, int threads) {
  FASTATTN_UNROLL
  for (int step = kWarpSize / 2; step; step /= 2)
    if (step < threads) x = fmaxf(x, shuffle_xor(x, step));
  return x;
}

FASTATTN_DEVICE float lanes_sum(float x, int threads) {
  FASTATTN_UNROLL
  for (int step = kWarpSize / 2; step; step /= 2)
    if (step < threads) x += shuffle_xor(x, step);
  return x;
}

// Sums over the threads of a row, in the same order for each of them.  All threads of the block come here together.
template <int kCount>
FASTATTN_DEVICE void row_sums(float (&x)[kCount], int threads) {
  FASTATTN_UNROLL
  for (int n = 0; n < kCount; ++n) x[n] = lanes_sum(x[n], threads);
  if (threads <= kWarpSize) return;
  const int warp = warp_index(), warps = threads / kWarpSize, first = warp / warps * warps;
  sync_block();
  if (lane_index() == 0) {
    FASTATTN_UNROLL
    for (int n = 0; n < kCount; ++n) store_shared(shared_base() + 4 * (n * kRowWarps + warp), x[n]);
  }
  sync_block();
  FASTATTN_UNROLL
  for (int n = 0; n < kCount; ++n) {
    x[n] = 0;
    for (int w = 0; w < warps; ++w) x[n] += load_shared<float>(shared_base() + 4 * (n * kRowWarps + first + w));
  }
}

inline constexpr int kRowSumBytes = 4 * 4 * kRowWarps;  // of four sums at most

// Which row a thread works on.
struct RowPlace {
  int b, h, i;
  int position;  // of row i among the columns

  template <class T>
  FASTATTN_DEVICE Stored<T>* of(const Rows& rows) const {
    return static_cast<Stored<T>*>(rows.data) + b * rows.batch + h * rows.head + i * rows.row;
  }
};

// A thread's row, and what of it the interval masks let it see.  The place lies in shared memory, each thread's own,
// and is read where it is asked for: in registers all of it would be live throughout, for stages that a call does not
// have.
struct OwnRow {
  Visible visible;

  FASTATTN_DEVICE OwnRow(const Attention& p, const RowDeal& deal) {
    const int index = block_index() * (kRowThreads / deal.threads) + thread_index() / deal.threads;
    const int row = index < deal.rows ? index : 0;
    const int i = row % p.query_length, h = row / p.query_length % p.heads, b = row / p.query_length / p.heads;
    const Interval interval = interval_of(p, b);
    const int position = i + interval.offset;
    keys_of_query(p, interval, position, visible.lo, visible.hi);
    // a thread may have no row, which is not a row that sees nothing
    visible.hi = index < deal.rows ? larger(visible.hi, 0) : -1;
    store_shared(at(), Words{b, h, i, position});
  }

  FASTATTN_DEVICE bool exists() const { return visible.hi >= 0; }

  FASTATTN_DEVICE RowPlace place() const {
    const Words words = load_shared<Words>(at());
    return {words.b, words.h, words.i, words.position};
  }

 private:
  struct alignas(16) Words {
    int b, h, i, position;
  };
  FASTATTN_DEVICE static SharedAddress at() { return shared_base() + kRowSumBytes + 16 * thread_index(); }
};

}  // namespace fastattn::cuda
