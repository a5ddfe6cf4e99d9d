// Gradients of the masked softmax, from its output y and the gradient dy of that:
//
//     dS = y * (dy - delta), delta = sum(y * dy);  dscores = scale * dS
//
// Nothing is seen of dy where y is 0, which holds for every masked place, so no mask is evaluated again.  Each row also
// yields the sums of dS from which the gradients of slopes, of the table's ends and of a column bias are made.
#pragma once

#include <cmath>

#include "row_threads.h"

namespace fastattn::cuda {

template <class T>
struct SoftmaxGradientRow {
  static constexpr int kN = kWide<T>;
  static constexpr int kChunks = 4;

  const SoftmaxGradientParams& p;
  OwnRow own;
  Columns<T, kChunks> columns;

  FASTATTN_DEVICE explicit SoftmaxGradientRow(const SoftmaxGradientParams& params)
      : p(params), own(params.features, params.deal), columns(params.deal) {}

  // y and dy of the tile, as they are in memory.
  FASTATTN_DEVICE void load(Vec4 (&y)[kChunks], Vec4 (&dy)[kChunks], int tile) const {
    const RowPlace place = own.place();
    const Stored<T>* const y_row = place.of<T>(p.out);
    const Stored<T>* const dy_row = place.of<T>(p.grad_out);
    FASTATTN_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      const int column = columns.chunk(tile, c);
      y[c] = load_chunk<T>(y_row, column, columns.step(), p.deal.wide, own.visible);
      dy[c] = load_chunk<T>(dy_row, column, columns.step(), p.deal.wide, own.visible);
    }
  }

  // A chunk as numbers, both 0 where y is and where the row does not see.
  FASTATTN_DEVICE void numbers(const Vec4& y_raw, const Vec4& dy_raw, int column, float (&y)[kN],
                               float (&dy)[kN]) const {
    widen<T>(y_raw, y);
    widen<T>(dy_raw, dy);
    FASTATTN_UNROLL
    for (int e = 0; e < kN; ++e) {
      if (!own.visible.sees(column + e * columns.step())) y[e] = 0.0f;
      if (y[e] == 0.0f) dy[e] = 0.0f;
    }
  }

  FASTATTN_DEVICE float delta(const Vec4 (&y)[kChunks], const Vec4 (&dy)[kChunks], int tile) const {
    float sum = 0.0f;
    FASTATTN_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      float a[kN], b[kN];
      numbers(y[c], dy[c], columns.chunk(tile, c), a, b);
      FASTATTN_UNROLL
      for (int e = 0; e < kN; ++e) sum += a[e] * b[e];
    }
    return sum;
  }

  // Writes dscores; adds to the sums of dS * |distance|, of dS at the table's left and right end, and of all dS.
  FASTATTN_DEVICE void finish(const Vec4 (&y)[kChunks], const Vec4 (&dy)[kChunks], int tile, float delta,
                              float (&sums)[4]) const {
    const Attention& f = p.features;
    const RowPlace place = own.place();
    FASTATTN_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      const int column = columns.chunk(tile, c);
      float ds[kN], b[kN];
      numbers(y[c], dy[c], column, ds, b);
      FASTATTN_UNROLL
      for (int e = 0; e < kN; ++e) ds[e] = ds[e] == 0.0f ? 0.0f : ds[e] * (b[e] - delta);
      if (p.distances || p.ends || p.totals) {
        FASTATTN_UNROLL
        for (int e = 0; e < kN; ++e) {
          const int distance = column + e * columns.step() - place.position;
          sums[0] += ds[e] * static_cast<float>(distance < 0 ? -distance : distance);
          if (distance <= -f.table_left)
            sums[1] += ds[e];
          else if (distance >= f.table_right)
            sums[2] += ds[e];
          sums[3] += ds[e];
        }
      }
      if (p.dscores.data && own.exists()) {
        FASTATTN_UNROLL
        for (int e = 0; e < kN; ++e) ds[e] *= p.scale;
        store_chunk<T>(place.of<T>(p.dscores), column, columns.step(), p.deal.wide, f.key_length, ds);
      }
    }
  }
};

template <class T>
FASTATTN_DEVICE void softmax_backward(const SoftmaxGradientParams& p) {
  using Row = SoftmaxGradientRow<T>;
  const Row row(p);
  Vec4 y[Row::kChunks], dy[Row::kChunks];
  float delta[1] = {0.0f};
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  FASTATTN_NO_UNROLL
  for (int step = 0; step < 2 * p.deal.tiles; ++step) {
    const bool writes = step >= p.deal.tiles;
    const int tile = writes ? step - p.deal.tiles : step;
    if (step == 0 || p.deal.tiles > 1) row.load(y, dy, tile);
    if (!writes) {
      delta[0] += row.delta(y, dy, tile);
      continue;
    }
    if (tile == 0) row_sums(delta, p.deal.threads);
    row.finish(y, dy, tile, delta[0], sums);
  }
  if (p.distances || p.ends || p.totals) row_sums(sums, p.deal.threads);
  if (!row.own.exists() || thread_index() % p.deal.threads) return;
  const RowPlace at = row.own.place();
  const i64 index = (static_cast<i64>(at.b) * p.features.heads + at.h) * p.features.query_length + at.i;
  if (p.delta) store_global(p.delta + index, delta[0]);
  if (p.distances) store_global(p.distances + index, sums[0]);
  if (p.ends) {
    store_global(p.ends + index, sums[1]);
    store_global(p.ends + p.deal.rows + index, sums[2]);
  }
  if (p.totals) store_global(p.totals + index, sums[3]);
}

}  // namespace fastattn::cuda
