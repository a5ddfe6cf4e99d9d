// What blocks of rows see by ids and masks: a block of threads for each, before the kernels that go by it.
//
// Rows that all see an interval have in common what lies in all of these; where one has a hole, nothing is said to be.
#pragma once

#include "../features/geometry.h"
#include "params.h"
#include "tiles.h"

namespace fastattn::cuda {

FASTATTN_DEVICE void attention_spans(const SpansParams& p) {
  constexpr int kRows = SpansTiles::kRows, kSteps = SpansTiles::kSteps;
  static_assert(kRows * SpansTiles::kWarps == kSpanRows);
  const int block = block_index() % p.blocks;
  const int h = block_index() / p.blocks % p.heads, b = block_index() / p.blocks / p.heads;
  const i64* const row_ids = p.row_ids.data + b * p.row_ids.batch;
  const i64* const column_ids = p.column_ids.data + b * p.column_ids.batch;
  const uint8_t* const mask = static_cast<const uint8_t*>(p.mask.data) + b * p.mask.batch + h * p.mask.head;

  // rows beyond the last are the last once more
  i64 row[kRows], id[kRows];
  int first[kRows], end[kRows], count[kRows];
  FASTATTN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    row[r] = smaller(block * kSpanRows + warp_index() * kRows + r, p.rows - 1);
    id[r] = p.row_ids.data ? load_constant(row_ids + row[r]) : 0;
    first[r] = p.columns;
    end[r] = count[r] = 0;
  }
  FASTATTN_NO_UNROLL
  for (int j0 = lane_index(); j0 < p.columns; j0 += 32 * kSteps) {
    FASTATTN_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      const int j = j0 + 32 * step;
      const bool inside = j < p.columns;
      const i64 own = inside && p.row_ids.data ? load_constant(column_ids + j) : 0;
      FASTATTN_UNROLL
      for (int r = 0; r < kRows; ++r) {
        bool seen = inside && id[r] == own;
        if (p.mask.data && seen) seen = load_constant(mask + row[r] * p.mask.row + j * p.mask.column) != 0;
        first[r] = seen ? smaller(first[r], j) : first[r];
        end[r] = seen ? j + 1 : end[r];
        count[r] += seen;
      }
    }
  }

  Range all{p.columns, 0, 0, p.columns};
  FASTATTN_UNROLL
  for (int r = 0; r < kRows; ++r) {
    FASTATTN_UNROLL
    for (int step = 16; step; step /= 2) {
      first[r] = smaller(first[r], shuffle_xor(first[r], step));
      end[r] = larger(end[r], shuffle_xor(end[r], step));
      count[r] += shuffle_xor(count[r], step);
    }
    const bool unbroken = count[r] > 0 && end[r] - first[r] == count[r];
    all = joined(all, {first[r], end[r], unbroken ? first[r] : p.columns, unbroken ? end[r] : 0});
  }
  const SharedAddress parts = shared_base();
  if (lane_index() == 0) store_shared(parts + 16 * warp_index(), __builtin_bit_cast(Vec4, all));
  sync_block();
  if (thread_index() > 0) return;
  FASTATTN_UNROLL
  for (int warp = 1; warp < SpansTiles::kWarps; ++warp)
    all = joined(all, __builtin_bit_cast(Range, load_shared<Vec4>(parts + 16 * warp)));
  store_global(reinterpret_cast<Vec4*>(p.spans) + block_index(), __builtin_bit_cast(Vec4, all));
}

}  // namespace fastattn::cuda
