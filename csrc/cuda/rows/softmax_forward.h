// Masked softmax of scores that are already there.
//
// A row is read once and written once; in between its threads hold it in registers, up to 8192 columns.  Longer ones
// take two passes over parts of the row, the first of which keeps a running maximum and sum.  Interval masks give the
// bounds of a row by arithmetic: what lies outside is written as 0 and not looked at.
#pragma once

#include <cmath>

#include "row_threads.h"

namespace fastattn::cuda {

inline constexpr float kExponentScale = 1.4426950408889634f;  // log2(e)

// Exponentials relative to the largest score of a row so far, and their sum.
struct Total {
  float top, sum;

  // What to subtract from the scores.
  FASTATTN_DEVICE float pivot() const { return top == -infinity() ? 0.0f : top; }
  FASTATTN_DEVICE static float weight(float score, float pivot) {
    // the difference comes first: finfo.min times log2(e) would be -inf
    return exp2_approx((score - pivot) * kExponentScale);
  }
  FASTATTN_DEVICE void raise(float higher) {
    const float before = top;
    top = fmaxf(top, higher);
    sum *= weight(before, pivot());
  }
};

FASTATTN_DEVICE Total row_total(Total mine, int threads) {
  mine.raise(lanes_max(mine.top, threads));
  mine.sum = lanes_sum(mine.sum, threads);
  if (threads <= kWarpSize) return mine;
  const int warp = warp_index(), warps = threads / kWarpSize, first = warp / warps * warps;
  if (lane_index() == 0) store_shared(shared_base() + 8 * warp, Vec2{{bits_of(mine.top), bits_of(mine.sum)}});
  sync_block();
  Total all{-infinity(), 0.0f};
  for (int w = 0; w < warps; ++w) {
    const Vec2 other = load_shared<Vec2>(shared_base() + 8 * (first + w));
    all.raise(float_of(other.x[0]));
    all.sum += float_of(other.x[1]) * Total::weight(float_of(other.x[0]), all.pivot());
  }
  return all;
}

// Elements of a chunk of the dense bias, whose columns are dense and aligned.
template <int kCount>
FASTATTN_DEVICE void load_bias_chunk(const Dense& bias, Element element, i64 at, float (&values)[kCount]) {
  if (element == Element::kFloat32) {
    FASTATTN_UNROLL
    for (int n = 0; n < kCount; n += 4) {
      const Vec4 raw = load_constant(reinterpret_cast<const Vec4*>(static_cast<const float*>(bias.data) + at + n));
      FASTATTN_UNROLL
      for (int k = 0; k < 4; ++k) values[n + k] = float_of(raw.x[k]);
    }
  } else {
    FASTATTN_UNROLL
    for (int n = 0; n < kCount; n += 4) {
      const Vec2 raw = load_constant(reinterpret_cast<const Vec2*>(static_cast<const uint16_t*>(bias.data) + at + n));
      FASTATTN_UNROLL
      for (int k = 0; k < 2; ++k) {
        float& low = values[n + 2 * k];
        float& high = values[n + 2 * k + 1];
        if (element == Element::kFloat16)
          unpack2<Half>(raw.x[k], low, high);
        else
          unpack2<BFloat16>(raw.x[k], low, high);
      }
    }
  }
}

// One thread's part of a row of masked scores.
template <class T>
struct SoftmaxRow {
  static constexpr int kN = kWide<T>;
  static constexpr int kChunks = 32 / kN;

  const SoftmaxParams& p;
  OwnRow own;
  Columns<T, kChunks> columns;

  FASTATTN_DEVICE explicit SoftmaxRow(const SoftmaxParams& params)
      : p(params), own(params.features, params.deal), columns(params.deal) {}

  // scale -> biases -> masks; -inf where masked.
  FASTATTN_DEVICE void load(float (&s)[kChunks][kN], int tile) const {
    const Stored<T>* const row = own.place().of<T>(p.scores);
    Vec4 raw[kChunks];
    FASTATTN_UNROLL
    for (int c = 0; c < kChunks; ++c)
      raw[c] = load_chunk<T>(row, columns.chunk(tile, c), columns.step(), p.deal.wide, own.visible);
    // one chunk after the other: passes over the whole tile would keep its columns in registers between them
    FASTATTN_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      widen<T>(raw[c], s[c]);
      FASTATTN_UNROLL
      for (int e = 0; e < kN; ++e) s[c][e] *= p.scale;
      mask_and_bias(s[c], columns.chunk(tile, c));
    }
  }

  // Applies f(value, column) to every element of a chunk.
  template <class F>
  FASTATTN_DEVICE void each(float (&s)[kN], int first, F f) const {
    FASTATTN_UNROLL
    for (int e = 0; e < kN; ++e) f(s[e], first + e * columns.step());
  }

  FASTATTN_DEVICE void mask_and_bias(float (&s)[kN], int first) const {
    const Attention& f = p.features;
    if (f.slopes.data) add_slopes(s, first);
    if (f.table) add_table(s, first);
    if (f.bias.data) add_bias(s, first);
    each(s, first, [&](float& x, int j) { x = own.visible.sees(j) ? x : -infinity(); });
    if (f.query_ids.data) hide_other_documents(s, first);
    if (f.mask.data) hide_masked(s, first);
  }

  FASTATTN_DEVICE void add_slopes(float (&s)[kN], int first) const {
    const RowPlace place = own.place();
    const PerHead& slopes = p.features.slopes;
    const float slope = load_constant(slopes.data + place.b * slopes.batch + place.h);
    each(s, first, [&](float& x, int j) {
      const int distance = j - place.position;
      x -= slope * static_cast<float>(distance < 0 ? -distance : distance);
    });
  }

  FASTATTN_DEVICE void add_table(float (&s)[kN], int first) const {
    const RowPlace place = own.place();
    const Attention& f = p.features;
    const float* const table = f.table + place.b * f.table_batch + place.h * f.table_head + f.table_left;
    each(s, first, [&](float& x, int j) {
      x += load_constant(table + smaller(larger(j - place.position, -f.table_left), f.table_right));
    });
  }

  FASTATTN_DEVICE void add_bias(float (&s)[kN], int first) const {
    const RowPlace place = own.place();
    const Attention& f = p.features;
    const i64 row = place.b * f.bias.batch + place.h * f.bias.head + place.i * f.bias.row;
    float added[kN] = {};
    if (!p.wide_bias) {
      each(added, first, [&](float& x, int j) {
        if (own.visible.sees(j)) x = load_number(f.bias.data, f.bias_element, row + j * f.bias.column);
      });
    } else if (own.visible.sees_some(first, first + kN - 1)) {
      load_bias_chunk(f.bias, f.bias_element, row + first, added);
    }
    FASTATTN_UNROLL
    for (int e = 0; e < kN; ++e) s[e] = added[e] == -infinity() ? added[e] : s[e] + added[e];
  }

  FASTATTN_DEVICE void hide_other_documents(float (&s)[kN], int first) const {
    const RowPlace place = own.place();
    const Attention& f = p.features;
    const i64 mine = load_constant(f.query_ids.data + place.b * f.query_ids.batch + place.i);
    const i64* const ids = f.key_ids.data + place.b * f.key_ids.batch;
    each(s, first, [&](float& x, int j) {
      if (own.visible.sees(j) && load_constant(ids + j) != mine) x = -infinity();
    });
  }

  FASTATTN_DEVICE void hide_masked(float (&s)[kN], int first) const {
    const RowPlace place = own.place();
    const Dense& mask = p.features.mask;
    const uint8_t* const row =
        static_cast<const uint8_t*>(mask.data) + place.b * mask.batch + place.h * mask.head + place.i * mask.row;
    if (!p.wide_mask) {
      each(s, first, [&](float& x, int j) {
        if (own.visible.sees(j) && !load_constant(row + j * mask.column)) x = -infinity();
      });
    } else if (own.visible.sees_some(first, first + kN - 1)) {
      FASTATTN_UNROLL
      for (int n = 0; n < kN; n += 4) {
        const uint32_t seen = load_constant(reinterpret_cast<const uint32_t*>(row + first + n));
        FASTATTN_UNROLL
        for (int k = 0; k < 4; ++k)
          if (!(seen >> (8 * k) & 0xFF)) s[n + k] = -infinity();
      }
    }
  }

  FASTATTN_DEVICE void add_to(Total& total, const float (&s)[kChunks][kN]) const {
    float top = -infinity();
    FASTATTN_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      FASTATTN_UNROLL
      for (int e = 0; e < kN; ++e) top = fmaxf(top, s[c][e]);
    }
    total.raise(top);
    const float pivot = total.pivot();
    FASTATTN_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      FASTATTN_UNROLL
      for (int e = 0; e < kN; ++e) total.sum += Total::weight(s[c][e], pivot);
    }
  }

  FASTATTN_DEVICE void store(float (&s)[kChunks][kN], int tile, const Total& total) const {
    const float pivot = total.pivot(), share = total.sum == 0.0f ? 0.0f : 1.0f / total.sum;
    Stored<T>* const row = own.place().of<T>(p.out);
    FASTATTN_UNROLL
    for (int c = 0; c < kChunks; ++c) {
      // 0 where masked, also in a row that sees NaN or +inf, whose visible weights are NaN
      FASTATTN_UNROLL
      for (int e = 0; e < kN; ++e) s[c][e] = s[c][e] == -infinity() ? 0.0f : Total::weight(s[c][e], pivot) * share;
      store_chunk<T>(row, columns.chunk(tile, c), columns.step(), p.deal.wide, p.features.key_length, s[c]);
    }
  }
};

template <class T>
FASTATTN_DEVICE void softmax_forward(const SoftmaxParams& p) {
  using Row = SoftmaxRow<T>;
  const Row row(p);
  float s[Row::kChunks][Row::kN];
  Total total{-infinity(), 0.0f};
  // both passes in one loop: the code of `load` is long, and here it is there once
  FASTATTN_NO_UNROLL
  for (int step = 0; step < 2 * p.deal.tiles; ++step) {
    const bool writes = step >= p.deal.tiles;
    const int tile = writes ? step - p.deal.tiles : step;
    if (step == 0 || p.deal.tiles > 1) row.load(s, tile);
    if (!writes) {
      row.add_to(total, s);
      continue;
    }
    if (tile == 0) total = row_total(total, p.deal.threads);
    if (row.own.exists()) row.store(s, tile, total);
  }
}

}  // namespace fastattn::cuda
