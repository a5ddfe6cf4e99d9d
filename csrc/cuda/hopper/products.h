// Tiles of shared memory as operands of warpgroup products, and the two products of attention.
//
// A tile's panels (attention/tile.h) are what tensor copies write with the 128-byte or 64-byte swizzle, and what wgmma
// reads with the same.  An accumulator d[4 n + r] of a lane is element [n][r] of attention/products.h, with warp w of
// the group in the place of a band: row 16 w + lane / 4 + 8 (r / 2), column 8 n + 2 (lane % 4) + r % 2.
#pragma once

#include "../arch/arch.h"
#include "../arch/hopper.h"
#include "../arch/overlap.h"
#include "../attention/tile.h"
#include "params.h"

namespace fastattn::cuda {

template <class Tile>
inline constexpr Swizzle kSwizzleOf = Tile::kPanelColumns == 64 ? Swizzle::k128 : Swizzle::k64;

// Rows along M or N, the product's sum along the columns.  The leading distance has no meaning for this order.
template <class Tile>
FASTATTN_DEVICE uint64_t by_rows(SharedAddress first_row) {
  return matrix_descriptor(first_row, 16, 8 * Tile::kRowBytes, kSwizzleOf<Tile>);
}

// Columns along M or N, the sum along the rows: from one panel to the next, and from eight rows to the next.
template <class Tile>
FASTATTN_DEVICE uint64_t by_columns(SharedAddress first_row) {
  return matrix_descriptor(first_row, Tile::kPanelBytes, 8 * Tile::kRowBytes, kSwizzleOf<Tile>);
}

// The start address is in the low word, and does not grow out of it: a carry would cost two instructions each time.
FASTATTN_DEVICE uint64_t advance(uint64_t descriptor, uint32_t bytes) {
  return (descriptor & 0xFFFFFFFF00000000u) | (static_cast<uint32_t>(descriptor) + (bytes >> 4));
}

// Step k of 32 bytes, of a by_rows operand: what one product takes.
template <class Tile>
FASTATTN_DEVICE uint64_t columns_step(uint64_t descriptor, int k) {
  return advance(descriptor, k / Tile::kPanelSteps * Tile::kPanelBytes + k % Tile::kPanelSteps * 32);
}

// s = A B^T over the tiles' common width: 64 rows of A from a_row on by all rows of B.  Issues and does not wait.
template <class T, class TileA, class TileB, int N>
FASTATTN_DEVICE void issue_rows_product(float (&s)[N], SharedAddress a_row, SharedAddress b) {
  static_assert(TileA::kDim == TileB::kDim && N == TileB::kRows / 2);
  const uint64_t left = by_rows<TileA>(a_row), right = by_rows<TileB>(b);
  FASTATTN_UNROLL
  for (int k = 0; k < TileA::kDim / 16; ++k)
    WarpgroupMultiply<T, TileB::kRows>::template shared<0, 0>(s, columns_step<TileA>(left, k),
                                                              columns_step<TileB>(right, k), k != 0);
}

// acc (+)= P B^T of 8 bits: P from registers, by all rows of tile B.  Issues and does not wait.
template <class T, class TileB, int N, int kSteps>
FASTATTN_DEVICE void issue_accumulate_rows(float (&acc)[N], const uint32_t (&p)[kSteps][4], SharedAddress b,
                                           bool accumulate) {
  static_assert(N == TileB::kRows / 2 && kSteps <= TileB::kDim / 16);
  const uint64_t right = by_rows<TileB>(b);
  FASTATTN_UNROLL
  for (int k = 0; k < kSteps; ++k)
    WarpgroupMultiply<T, TileB::kRows>::template registers<0>(acc, p[k], columns_step<TileB>(right, k),
                                                              accumulate || k != 0);
}

// acc += P B: P from registers, by all columns of tile B.  Issues and does not wait.
template <class T, class TileB, int N>
FASTATTN_DEVICE void issue_accumulate(float (&acc)[N], const uint32_t (&p)[TileB::kRows / 16][4], SharedAddress b) {
  static_assert(N == TileB::kDim / 2);
  const uint64_t right = by_columns<TileB>(b);
  FASTATTN_UNROLL
  for (int k = 0; k < TileB::kRows / 16; ++k)
    WarpgroupMultiply<T, TileB::kDim>::template registers<1>(acc, p[k], advance(right, k * 16 * TileB::kRowBytes),
                                                             true);
}

// Brings rows of a tensor into a tile; the barrier's phase takes its bytes.  What lies outside the tensor is zero.
template <class Tile, class Operand>
FASTATTN_DEVICE void load_tile(SharedAddress tile, const Operand& from, SharedAddress barrier, int row, int head,
                               int batch, CachePolicy policy) {
  mbarrier_arrive_expect(barrier, Tile::kBytes);
  FASTATTN_UNROLL
  for (int panel = 0; panel < Tile::kDim / Tile::kPanelColumns; ++panel)
    tensor_load_4d(tile + panel * Tile::kPanelBytes, &from.map, barrier, panel * Tile::kPanelElements, row,
                   head * from.head_step, batch * from.batch_step, policy);
}

// The same of a tile of queries, whose rows are packed: a box for each group of 64.
template <class Tile>
FASTATTN_DEVICE void load_packed_tile(SharedAddress tile, const MappedOperand& from, const Packing& packing,
                                      SharedAddress barrier, int query, int head, int batch, CachePolicy policy) {
  constexpr int kPanels = Tile::kDim / Tile::kPanelColumns, kGroups = Tile::kRows / 64;
  mbarrier_arrive_expect(barrier, kGroups * kPanels * Tile::kRowBytes * packing.heads * packing.queries);
  FASTATTN_NO_UNROLL
  for (int group = 0; group < kGroups; ++group) {
    FASTATTN_UNROLL
    for (int panel = 0; panel < kPanels; ++panel)
      tensor_load_4d(tile + panel * Tile::kPanelBytes + 64 * group * Tile::kRowBytes, &from.map, barrier,
                     panel * Tile::kPanelElements, head * from.head_step, query + group * packing.queries,
                     batch * from.batch_step, policy);
  }
}

}  // namespace fastattn::cuda
