// Joins the parts of rows whose keys were split: a warp per row.
#pragma once

#include "row_end.h"
#include "tiles.h"

namespace fastattn::cuda {

FASTATTN_DEVICE void attention_combine(const CombineParams& p) {
  const i64 rows = static_cast<i64>(p.batch) * p.heads * p.query_length;
  const i64 row = static_cast<i64>(block_index()) * CombineTiles::kRows + warp_index();
  if (row >= rows) return;
  const int i = static_cast<int>(row % p.query_length), h = static_cast<int>(row / p.query_length % p.heads);
  const int b = static_cast<int>(row / p.query_length / p.heads);
  const float sink = p.sink.data ? load_constant(p.sink.data + b * p.sink.batch + h) : -infinity();
  float largest = -infinity(), sum = 0.0f;
  for (int s = 0; s < p.splits; ++s) largest = fmaxf(largest, load_constant(p.partial_stat + 2 * (s * rows + row)));
  const float pivot = largest == -infinity() ? 0.0f : largest;
  for (int s = 0; s < p.splits; ++s)
    sum += exp2_approx(load_constant(p.partial_stat + 2 * (s * rows + row)) - pivot) *
           load_constant(p.partial_stat + 2 * (s * rows + row) + 1);
  const RowEnd end = end_row(largest, sum, sink);
  uint16_t* out = static_cast<uint16_t*>(p.out.data) + b * p.out.batch + h * p.out.head + i * p.out.row;
  for (int column = 2 * lane_index(); column < p.value_dim; column += 64) {
    float low = 0.0f, high = 0.0f;
    for (int s = 0; s < p.splits; ++s) {
      // a part that saw nothing has a factor of zero
      const float factor = exp2_approx(load_constant(p.partial_stat + 2 * (s * rows + row)) - pivot);
      const float* part = p.partial_out + (s * rows + row) * p.value_dim + column;
      low += factor * load_constant(part);
      high += factor * load_constant(part + 1);
    }
    low *= end.factor;
    high *= end.factor;
    store_global(reinterpret_cast<uint32_t*>(out + column),
                 p.element == Element::kFloat16 ? pack2<Half>(low, high) : pack2<BFloat16>(low, high));
  }
  if (lane_index() == 0) store_row_end(end, p.lse, p.statistics, row);
}

}  // namespace fastattn::cuda
