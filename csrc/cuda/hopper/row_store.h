// Rows of a warpgroup's accumulators to global memory, through shared memory.
#pragma once

#include "../attention/params.h"
#include "params.h"
#include "products.h"

namespace fastattn::cuda {

// A barrier for each group of consumers, to meet at.
inline constexpr int kGroupBarrier = 8, kGroupThreads = 128;

// kPacked: rows are (query, head) pairs as `packing` has them, and `to` is a packed map (packed_map_of).
//
// kOwnPlace: `tile` is for this alone; else it takes the place of a tile that this group has read, and is free again
// when the call returns.  The thread that issues() waits for the last copy before the block exits, where kOwnPlace.
template <class T, class RowTile, bool kOwnPlace, bool kPacked = false>
struct RowStore {
  const MappedOperand& to;
  const Result& rows_to;  // the same, for rows that do not go through shared memory
  SharedAddress tile;
  int group, length, dim;  // rows and columns of the result
  Packing packing = {};

  FASTATTN_DEVICE bool issues() const { return (thread_index_again() & (kGroupThreads - 1)) == 0; }
  // The group's first row in `tile`, which groups share unless it has 64 rows.
  FASTATTN_DEVICE int first() const { return RowTile::kRows == 64 ? 0 : 64 * group; }
  FASTATTN_DEVICE void meet() const { named_barrier_sync(kGroupBarrier + group, kGroupThreads); }

  // 64 rows of this group, times a factor each; row0: the first of the block's.
  FASTATTN_DEVICE void operator()(int row0, int b, int h, const float (&acc)[RowTile::kDim / 2],
                                  const float (&factor)[2]) const {
    if constexpr (kOwnPlace) {
      if (issues()) bulk_wait_read<0>();  // the copy before has left
    }
    meet();  // and, in another tile's place, this group has read it
    const int thread = thread_index_again();
    const SharedAddress own = tile + RowTile::lane_part(first() + (thread >> 1 & 48) + (thread & 15), thread >> 4 & 1);
    FASTATTN_UNROLL
    for (int j = 0; j < RowTile::kDim / 16; ++j) {
      uint32_t r[4];
      FASTATTN_UNROLL
      for (int n = 0; n < 4; ++n)
        r[n] = pack2<T>(acc[8 * j + 2 * n] * factor[n & 1], acc[8 * j + 2 * n + 1] * factor[n & 1]);
      store_matrix_x4(RowTile::at(own, j), r);
    }
    fence_async_shared();
    meet();
    if (issues()) {
      FASTATTN_UNROLL
      for (int panel = 0; panel < RowTile::kDim / RowTile::kPanelColumns; ++panel) {
        const int column = panel * RowTile::kPanelColumns;
        if (column >= dim) continue;
        const SharedAddress from = tile + panel * RowTile::kPanelBytes + first() * RowTile::kRowBytes;
        if constexpr (kPacked) {
          tensor_store_4d(&to.map, from, column, h, row0 + group * packing.queries, b);
        } else {
          tensor_store_4d(&to.map, from, column, row0 + first(), h, b);
        }
      }
      bulk_commit();
    }
    if constexpr (!kOwnPlace) {
      if (issues()) bulk_wait_read<0>();
      meet();  // before other rows may come
    }
  }

  FASTATTN_DEVICE void zeros(int row0, int b, int h) const {
    uint16_t* out = static_cast<uint16_t*>(rows_to.data) + b * rows_to.batch + h * rows_to.head;
    const int chunks = dim / 8, start = row0 + (kPacked ? group * packing.queries : first());
    FASTATTN_NO_UNROLL
    for (int n = thread_index_again() & (kGroupThreads - 1); n < 64 * chunks; n += kGroupThreads) {
      const int row = n / chunks, query = kPacked ? row * packing.reciprocal >> 16 : row;
      const int i = start + query, head = kPacked ? row - query * packing.heads : 0;
      if ((!kPacked || query < packing.queries) && i < length)
        store_global(reinterpret_cast<Vec4*>(out + head * rows_to.head + i * rows_to.row + n % chunks * 8),
                     Vec4{{0, 0, 0, 0}});
    }
  }
};

}  // namespace fastattn::cuda
