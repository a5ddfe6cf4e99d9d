// Additive attention, forward: an online softmax over tiles of keys, as attention's own, around additive scores.
//
// A work item is a block of query rows of one (batch, head).  It packs each tile of keys once; strips of rows then meet
// it panel by panel, so that a panel stays in the first cache while the strip goes by.
#pragma once

#include "additive_scores.h"
#include "finish.h"

namespace fastattn::cpu::FASTATTN_ISA {

template <class T>
class AdditiveForward {
 public:
  AdditiveForward(const Problem& problem, const View& weights, const ForwardOutput& output, i64 threads)
      : p(problem), weight(weights), o(output), panels(p.head_dim) {
    value_width = round_up(larger(p.value_dim, i64{1}), kLane);
    tile_panels = smaller(ceil_div(larger(p.key_length, i64{1}), kWidth), kMaxPanels);
    tile = tile_panels * kWidth;
    // Large blocks amortise packing; small ones balance threads.
    rows_per_block = smaller(larger(p.query_length, i64{1}), i64{256});
    while (rows_per_block > 64 && p.batch * p.query_heads * ceil_div(p.query_length, rows_per_block) < 4 * threads)
      rows_per_block = ceil_div(rows_per_block, 2);
    row_blocks = ceil_div(p.query_length, rows_per_block);
  }

  i64 items() const { return p.batch * p.query_heads * row_blocks; }
  static void run_item(void* self, i64 index) { static_cast<const AdditiveForward*>(self)->run(index); }

 private:
  static constexpr i64 kLane = kLanes<T>, kWidth = AdditivePanels<T>::kWidth;
  static constexpr i64 kMaxPanels = 4, kStrip = 16;

  const Problem& p;
  const View& weight;
  const ForwardOutput& o;
  AdditivePanels<T> panels;
  i64 value_width, tile_panels, tile, rows_per_block, row_blocks;

  struct Scratch {
    T *weight, *keys, *values, *accumulator, *maximum, *sum, *scores, *staging, *temp;
    uint8_t* value_bad;
    AdditiveQuery<T> queries[kStrip];
  };

  Scratch layout(Arena& arena) const {
    Scratch s;
    s.weight = arena.take<T>(panels.padded_dim);
    s.keys = arena.take<T>(tile_panels * panels.panel());
    s.values = arena.take<T>(tile * value_width);
    s.accumulator = arena.take<T>(rows_per_block * value_width);
    s.maximum = arena.take<T>(rows_per_block);
    s.sum = arena.take<T>(rows_per_block);
    s.scores = arena.take<T>(kStrip * tile);
    s.staging = arena.take<T>(kLane * panels.padded_dim);
    s.temp = arena.take<T>(larger(tile, value_width));
    s.value_bad = arena.take<uint8_t>(tile);
    for (auto& query : s.queries) query = AdditiveQuery<T>::take(arena, panels);
    return s;
  }

  void run(i64 index) const {
    // Later rows first: under a causal mask they are the long ones.
    const i64 units = p.batch * p.query_heads;
    const i64 first = (row_blocks - 1 - index / units) * rows_per_block;
    const i64 b = index % units / p.query_heads, h = index % p.query_heads;
    const i64 rows = smaller(rows_per_block, p.query_length - first);
    Arena measure(nullptr);
    layout(measure);
    Arena arena(thread_scratch(measure.used()));
    Scratch s = layout(arena);
    FlushScope flush;

    const Scorer<T> scorer(p, b, h);
    load_weight(weight, b, h, s.weight);
    std::memset(s.accumulator, 0, rows * value_width * sizeof(T));
    for (i64 r = 0; r < rows; ++r) s.maximum[r] = -kInfinity<T>, s.sum[r] = 0;
    const RowSource<T> keys(p.key, b, h / p.group()), values(p.value, b, h / p.group());
    const i64 low = scorer.geometry.visible(first).low, high = scorer.geometry.visible(first + rows - 1).high;
    for (i64 origin = round_down(low, tile); origin < high; origin += tile) {
      const i64 count = smaller(tile, high - origin);
      if (document_columns(p, b, first, rows, origin, {0, count}).empty()) continue;
      for (i64 n = 0; n * kWidth < count; ++n)
        panels.pack(keys, origin + n * kWidth, smaller(kWidth, count - n * kWidth), false, s.staging,
                    s.keys + n * panels.panel());
      const bool bad_values = pack_values(values, origin, count, s);
      for (i64 r = 0; r < rows; r += kStrip)
        strip(scorer, s, first, r, smaller(kStrip, rows - r), origin, count, bad_values ? &values : nullptr);
    }
    for (i64 r = 0; r < rows; ++r)
      finish_row(scorer, o, first + r, s.maximum[r], s.sum[r], s.accumulator + r * value_width, value_width);
  }

  // Rows of numbers, zeros where a row is not finite: then it is flagged, and the answer is true.
  bool pack_values(const RowSource<T>& values, i64 origin, i64 count, const Scratch& s) const {
    bool any = false;
    for (i64 j = 0; j < tile; ++j) {
      T* const row = s.values + j * value_width;
      if (j < count) values.load(origin + j, row);
      s.value_bad[j] = j < count && !all_finite(row, p.value_dim);
      any |= s.value_bad[j];
      const i64 kept = j < count && !s.value_bad[j] ? p.value_dim : 0;
      std::memset(row + kept, 0, (value_width - kept) * sizeof(T));
    }
    return any;
  }

  // Non-null bad_values say that the tile has flagged rows.
  void strip(const Scorer<T>& scorer, Scratch& s, i64 first, i64 r0, i64 rows, i64 origin, i64 count,
             const RowSource<T>* bad_values) const {
    const i64 i0 = first + r0;
    const Interval columns = visible_columns(p, scorer.geometry, {scorer.b, scorer.h, 1, i0, rows}, origin, count);
    if (columns.empty()) return;
    const i64 begin = round_down(columns.low, kWidth), end = round_up(columns.high, kWidth);
    const RowSource<T> queries(p.query, scorer.b, scorer.h);
    for (i64 r = 0; r < rows; ++r) s.queries[r].load_row(panels, queries, i0 + r, false);
    for (i64 j = begin; j < end; j += kWidth)
      for (i64 r = 0; r < rows; ++r)
        additive_scores<false>(panels, s.queries[r], s.weight, s.keys + j / kWidth * panels.panel(),
                               s.scores + r * tile + j, static_cast<T*>(nullptr));
    for (i64 r = 0; r < rows; ++r) {
      T* const score = s.scores + r * tile;
      const Interval live = scorer.apply(i0 + r, origin, begin, end, score, s.temp, static_cast<T*>(nullptr));
      if (!live.empty()) softmax_step(scorer, i0 + r, s, r0 + r, origin, live, score);
      if (begin < live.low) std::memset(score + begin, 0, (live.low - begin) * sizeof(T));
      if (live.high < end) std::memset(score + live.high, 0, (end - live.high) * sizeof(T));
    }
    T* acc = s.accumulator + r0 * value_width;
    const T* weights = s.scores;
    i64 r = 0;
    for (; r + 4 <= rows; r += 4) add_values<4>(s, weights + r * tile, begin, end, acc + r * value_width);
    for (; r < rows; ++r) add_values<1>(s, weights + r * tile, begin, end, acc + r * value_width);
    if (bad_values) add_bad_values(scorer, s, i0, r0, rows, origin, begin, smaller(end, count), *bad_values);
  }

  // Scores of one row to weights, relative to the row's largest score so far.
  void softmax_step(const Scorer<T>& scorer, i64 i, const Scratch& s, i64 row, i64 origin, Interval live,
                    T* score) const {
    const T before = s.maximum[row], now = larger(before, row_max(score, live.low, live.high));
    if (now != before) {
      s.maximum[row] = now;
      if (before != -kInfinity<T>) {
        const T shrink = exp2(splat((before - now) * scorer.factor))[0];
        s.sum[row] *= shrink;
        T* const acc = s.accumulator + row * value_width;
        for (i64 d = 0; d < value_width; d += kLane) store(acc + d, load(acc + d) * shrink);
      }
    }
    const T reference = now == -kInfinity<T> ? T(0) : now;
    s.sum[row] += scorer.plain ? reduce_add<T>(row_exp<true, PlainMode<T>::kExpDegree>(score, live.low, live.high,
                                                                                       reference, scorer.factor))
                               : reduce_add<T>(row_exp<false, PlainMode<T>::kExpDegree>(score, live.low, live.high,
                                                                                        reference, scorer.factor));
    if (p.dropout_p > 0) {
      scorer.dropout_factors(i, origin, live.low, live.high, s.temp);
      for (i64 j = live.low; j < live.high; ++j) score[j] *= s.temp[j];
    }
  }

  // acc[r] += sum over keys of weight[r][j] value[j], kRows rows at a time.
  template <int kRows>
  void add_values(const Scratch& s, const T* weights, i64 begin, i64 end, T* acc) const {
    i64 d = 0;
    for (; d + 4 * kLane <= value_width; d += 4 * kLane) add_value_columns<kRows, 4>(s, weights, begin, end, d, acc);
    for (; d < value_width; d += kLane) add_value_columns<kRows, 1>(s, weights, begin, end, d, acc);
  }

  template <int kRows, int kColumns>
  void add_value_columns(const Scratch& s, const T* weights, i64 begin, i64 end, i64 d, T* acc) const {
    Vec<T> sum[kRows][kColumns];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) sum[r][c] = load(acc + r * value_width + d + c * kLane);
    for (i64 j = begin; j < end; ++j) {
      const T* const value = s.values + j * value_width + d;
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) {
        const Vec<T> v = load(value + c * kLane);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) sum[r][c] += v * weights[r * tile + j];
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < kColumns; ++c) store(acc + r * value_width + d + c * kLane, sum[r][c]);
  }

  // Visible pairs with a flagged value row, from the original numbers.
  void add_bad_values(const Scorer<T>& scorer, const Scratch& s, i64 i0, i64 r0, i64 rows, i64 origin, i64 begin,
                      i64 end, const RowSource<T>& values) const {
    for (i64 j = begin; j < end; ++j) {
      if (!s.value_bad[j]) continue;
      values.load(origin + j, s.temp);
      for (i64 r = 0; r < rows; ++r) {
        if (!scorer.visible(i0 + r, origin + j)) continue;
        T* const acc = s.accumulator + (r0 + r) * value_width;
        for (i64 d = 0; d < p.value_dim; ++d) acc[d] += s.scores[r * tile + j] * s.temp[d];
      }
    }
  }
};

template <class T>
inline void additive_forward(const Problem& problem, const View& weight, const ForwardOutput& output,
                             const Parallel& parallel) {
  AdditiveForward<T> kernel(problem, weight, output, parallel.threads);
  parallel.run(kernel.items(), &AdditiveForward<T>::run_item, &kernel);
}

}  // namespace fastattn::cpu::FASTATTN_ISA
