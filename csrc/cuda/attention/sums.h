// The small sums after the backward: partial results of blocks to gradients, in one fixed order.
#pragma once

#include "../features/geometry.h"
#include "params.h"
#include "tiles.h"

namespace fastattn::cuda {

// A block per (batch of the result, head).
FASTATTN_DEVICE void sum_partials(const SumPartialsParams& p) {
  const int h = block_index() % p.heads, out_b = block_index() / p.heads;
  float sum = 0.0f;
  for (int b = p.sum_batch ? 0 : out_b; b < (p.sum_batch ? p.batch : out_b + 1); ++b)
    for (int t = thread_index(); t < p.count; t += SumTiles::kThreads)
      sum += load_constant(p.partial + ((static_cast<i64>(b) * p.heads + h) * p.count + t) * p.step + p.first);
  for (int step = 16; step; step /= 2) sum += shuffle_xor(sum, step);
  if (lane_index() == 0) store_shared(shared_base() + 4 * warp_index(), sum);
  sync_block();
  if (thread_index() == 0) {
    float total = 0.0f;
    for (int w = 0; w < SumTiles::kThreads / 32; ++w) total += load_shared<float>(shared_base() + 4 * w);
    float* out = p.out + out_b * p.out_batch + h * p.out_head;
    store_global(out, p.accumulate ? load_global(out) + total : total);
  }
}

// A thread per inner column of the table.
FASTATTN_DEVICE void sum_diagonals(const SumDiagonalsParams& p) {
  const i64 item = static_cast<i64>(block_index()) * SumTiles::kThreads + thread_index();
  const int c = static_cast<int>(item % p.columns), h = static_cast<int>(item / p.columns % p.heads);
  const int out_b = static_cast<int>(item / p.columns / p.heads);
  if (out_b >= p.out_batch || c == 0 || c == p.columns - 1) return;
  float sum = 0.0f;
  for (int a = p.out_batch == 1 ? 0 : out_b; a < (p.out_batch == 1 ? p.apart : out_b + 1); ++a) {
    const int offset = p.query_offsets.data ? clamped(load_constant(p.query_offsets.data + a * p.query_offsets.batch),
                                                      -kFarthest, kFarthest)
                                            : p.query_offset;
    // key - query index of this column's distance; diagonal n of the blocks holds 64 * n - 63 ... 64 * n + 63
    const int difference = c - p.table_left + offset;
    const int low = difference >= 0 ? difference / 64 : -((63 - difference) / 64);
    for (int n = low; n <= low + 1; ++n) {
      const int x = difference - 64 * n + 63, diagonal = n - p.first_diagonal;
      if (x < 0 || diagonal < 0 || diagonal >= p.diagonals) continue;
      for (int s = 0; s < p.splits; ++s)
        sum += load_constant(p.partial +
                             (((static_cast<i64>(a) * p.heads + h) * p.diagonals + diagonal) * p.splits + s) * 128 + x);
    }
  }
  store_global(p.dtable + item, sum);
}

// One instance for both: they are small.
FASTATTN_DEVICE void attention_sum(const SumParams& p) {
  if (p.diagonals.dtable) {
    sum_diagonals(p.diagonals);
  } else {
    sum_partials(p.partials);
  }
}

}  // namespace fastattn::cuda
