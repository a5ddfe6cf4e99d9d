// Attention that also gives its weights: the output and softmax(S), of every head or averaged over the heads.
//
// The weights are as long as the keys anyway, so a strip of queries takes all its keys at once and its softmax needs no
// rescaling:
//     S = Q K^T -> score pipeline -> P = exp(S - max) -> weights of the row, P V.
// A strip is as high as its scores stay in the second-level cache: a panel of keys, and a stretch of values, come from
// there once for all its rows.
// A work item is a block of query rows of one batch element and of all heads (of one key head where each head's weights
// are asked for).  The heads come one after the other, in their order, and add to the block's averages: nothing of size
// (heads, Sq, Sk) exists.  Keys and values are packed by the item if it is the only one that wants them, else once for
// all blocks, for so many batch elements at a time as a bound on that memory allows.
//
// Everything is cut up by the shape alone: results do not depend on the threads.
#pragma once

#include "arena.h"
#include "finish.h"

namespace fastattn::cpu::FASTATTN_ISA {

template <class Mode>
class WeightsForward {
 public:
  using Acc = typename Mode::Acc;
  using A = typename Mode::A;
  using B = typename Mode::B;

  static constexpr bool kTiles = kTileRegisters && Mode::kPair == 2;
  static constexpr i64 kStrip = kTiles ? 32 : 12;  // strips are multiples of it

  WeightsForward(const Problem& problem, const ForwardOutput& output, const WeightsOutput& weights)
      : p(problem), o(output), w(weights) {
    keys = round_up(larger(p.key_length, i64{1}), Mode::kColumnMultiple);
    key_rows = round_up(keys, Mode::kPanel);
    depth = round_up(p.head_dim, Mode::kDepthMultiple);
    width = round_up(larger(depth, i64{1}), kBlock);
    value_width = round_up(larger(p.value_dim, i64{1}), kWholeColumns<Mode>);
    units = w.average ? 1 : p.kv_heads;
    choose_blocks();
  }

  void run(const Parallel& parallel) {
    if (row_blocks == 1) {
      round = p.batch;
      return parallel.run(items(), &run_item, this);
    }
    const i64 bytes = p.kv_heads * static_cast<i64>(operand_size() * sizeof(B));
    round = smaller(p.batch, larger(kPackedBytes / larger(bytes, i64{1}), i64{1}));
    packed = Buffer<B>(round * p.kv_heads * operand_size());
    flags = Buffer<uint8_t>(round * p.kv_heads * flag_size());
    for (start = 0; start < p.batch; start += round) {
      round = smaller(round, p.batch - start);
      parallel.run(2 * round * p.kv_heads, &pack_item, this);
      parallel.run(items(), &run_item, this);
    }
  }

 private:
  static constexpr i64 kLane = kLanes<Acc>;
  static constexpr i64 kPieces = Mode::kPieces;
  static constexpr i64 kBlock = kLanes<B> * Mode::kPair;  // transposed block of pack_transposed
  static constexpr i64 kItems = 16;                       // wanted work items
  static constexpr i64 kLeastRows = kTiles ? 64 : 48;     // of an item, if there are so many
  static constexpr i64 kAverageBytes = i64{256} << 10;    // of an item's averages
  static constexpr i64 kScoreBytes = i64{256} << 10;      // of a strip's scores
  static constexpr i64 kBandRows = kTiles ? 64 : 48;      // of a strip whose rows see different keys
  static constexpr i64 kStretch = 128 * Mode::kPair;      // of values: a panel of it fits into the first-level cache
  static constexpr i64 kPackedBytes = i64{4} << 20;

  const Problem& p;
  const ForwardOutput& o;
  const WeightsOutput& w;
  i64 keys, key_rows, depth, width, value_width;
  i64 units;  // parts that the heads of a batch element are cut into
  i64 rows_per_block = 1, row_blocks = 1, strip_rows = 1;
  i64 start = 0, round = 1;  // the batch elements whose operands are packed
  Buffer<B> packed;          // (round, Hk): keys, then values
  Buffer<uint8_t> flags;     // (round, Hk): flags of keys and values, then whether there are any

  void choose_blocks() {
    const i64 queries = larger(p.query_length, i64{1});
    const i64 wanted = ceil_div(p.batch * units * queries, kItems);
    const i64 fitting = kAverageBytes / (keys * i64{sizeof(Acc)});
    rows_per_block = smaller(queries, round_up(larger(smaller(wanted, fitting), kLeastRows), kStrip));
    row_blocks = ceil_div(queries, rows_per_block);
    const bool band = p.window_left >= 0 || p.window_right >= 0 || p.query_ids;
    const i64 cached = round_down(kScoreBytes / (keys * i64{sizeof(Acc)}), kStrip);
    strip_rows = smaller(round_up(rows_per_block, kStrip), larger(cached, kStrip));
    if (band) strip_rows = smaller(strip_rows, kBandRows);
  }

  i64 items() const { return round * units * row_blocks; }

  i64 key_size() const { return key_rows * kPieces * larger(depth / Mode::kPair, i64{1}); }
  i64 operand_size() const { return round_up(key_size() + value_width * kPieces * keys / Mode::kPair, 64); }
  i64 flag_size() const { return 2 * keys + 2; }

  // Packed keys and values of one key head.
  struct Operands {
    B *keys, *values;
    uint8_t *key_bad, *value_bad, *any;  // any[0]: of the keys, any[1]: of the values
  };

  static Operands operands(B* memory, uint8_t* flag, i64 key_size, i64 keys) {
    return {memory, memory + key_size, flag, flag + keys, flag + 2 * keys};
  }
  Operands shared(i64 b, i64 kv_head) const {
    const i64 at = (b - start) * p.kv_heads + kv_head;
    // malloc aligns to 16 bytes, and vectors across two cache lines would take twice the time
    B* const aligned = reinterpret_cast<B*>(round_up(reinterpret_cast<intptr_t>(packed.data()), 64));
    return operands(aligned + at * operand_size(), flags.data() + at * flag_size(), key_size(), keys);
  }

  struct Scratch {
    A* query;
    B* operands;
    uint8_t *flags, *query_bad;
    Acc *scores, *accumulator, *average, *maximum, *staging, *temp;
    RowEnd<Acc>* ends;
    A* weights;
  };

  Scratch layout(Arena& arena) const {
    const i64 rows = round_up(rows_per_block, kStrip);
    const bool own = row_blocks == 1;
    Scratch s;
    s.query = arena.take<A>(rows * kPieces * larger(depth, i64{1}));
    s.operands = arena.take<B>(own ? operand_size() : 0);
    s.flags = arena.take<uint8_t>(own ? flag_size() : 0);
    s.query_bad = arena.take<uint8_t>(rows);
    s.scores = arena.take<Acc>(strip_rows * score_row());
    s.weights = Mode::kPair == 2 ? arena.take<A>(strip_rows * weight_row()) : nullptr;
    s.accumulator = arena.take<Acc>(strip_rows * value_width);
    s.maximum = arena.take<Acc>(strip_rows);
    s.ends = arena.take<RowEnd<Acc>>(strip_rows);
    s.average = arena.take<Acc>(w.average ? rows * keys : 0);
    s.staging = arena.take<Acc>(kPackRows<Mode> * larger(width, value_width));
    s.temp = arena.take<Acc>(2 * larger(keys, larger(width, value_width)));
    return s;
  }

  i64 score_row() const { return tile_row<Acc>(keys); }
  i64 weight_row() const { return tile_row<A>(kPieces * keys); }

  RowSource<Acc> key_source(i64 b, i64 kv_head) const {
    return RowSource<Acc>(p.key, b, kv_head).rotated(p.key_cos, p.key_sin, 0, p.interleaved);
  }
  RowSource<Acc> query_source(const Scorer<Acc>& scorer) const {
    return RowSource<Acc>(p.query, scorer.b, scorer.h)
        .rotated(p.query_cos, p.query_sin, scorer.geometry.offset, p.interleaved);
  }

  void pack_keys(i64 b, i64 kv_head, const Operands& x, Acc* staging) const {
    x.any[0] =
        pack_transposed<Mode>(key_source(b, kv_head), 0, p.key_length, keys, depth, width, staging, x.keys, x.key_bad);
  }
  void pack_values(i64 b, i64 kv_head, const Operands& x, Acc* staging) const {
    x.any[1] = p.value_dim > 0 && pack_depth<Mode>(RowSource<Acc>(p.value, b, kv_head), 0, p.key_length, keys,
                                                   value_width, staging, x.values, x.value_bad);
  }

  static void pack_item(void* self, i64 index) { static_cast<const WeightsForward*>(self)->pack(index); }
  void pack(i64 index) const {
    Arena arena(thread_scratch(kPackRows<Mode> * larger(width, value_width) * sizeof(Acc) + 64));
    Acc* const staging = arena.take<Acc>(kPackRows<Mode> * larger(width, value_width));
    const i64 b = start + index / 2 / p.kv_heads, kv_head = index / 2 % p.kv_heads;
    const Operands x = shared(b, kv_head);
    if (index % 2)
      pack_values(b, kv_head, x, staging);
    else
      pack_keys(b, kv_head, x, staging);
  }

  static void run_item(void* self, i64 index) { static_cast<const WeightsForward*>(self)->item(index); }
  void item(i64 index) const {
    // Later rows first: under a causal mask they are the long ones.
    const i64 first = (row_blocks - 1 - index / (round * units)) * rows_per_block;
    const i64 rows = smaller(rows_per_block, p.query_length - first);
    const i64 unit = index % units, b = start + index / units % round;
    Arena measure(nullptr);
    layout(measure);
    Arena arena(thread_scratch(measure.used()));
    const Scratch s = layout(arena);
    FlushScope flush;
    TileScope<Mode> tiles;

    if (w.average) std::memset(s.average, 0, rows * keys * sizeof(Acc));
    for (i64 kv_head = unit; kv_head < (w.average ? p.kv_heads : unit + 1); ++kv_head) {
      Operands x;
      if (row_blocks == 1) {
        x = operands(s.operands, s.flags, key_size(), keys);
        pack_keys(b, kv_head, x, s.staging);
        pack_values(b, kv_head, x, s.staging);
      } else {
        x = shared(b, kv_head);
      }
      for (i64 h = kv_head * p.group(); h < (kv_head + 1) * p.group(); ++h) {
        const Scorer<Acc> scorer(p, b, h);
        const bool bad_queries =
            pack_rows<Mode>(query_source(scorer), first, rows, depth, s.staging, s.query, s.query_bad);
        for (i64 r = 0; r < rows; r += strip_rows)
          strip(scorer, s, x, first, r, smaller(strip_rows, rows - r), x.any[0] || bad_queries);
      }
    }
    if (w.average)
      for (i64 r = 0; r < rows; ++r) store_weights(s.average + r * keys, b, 0, first + r);
  }

  // Rows [r, r + rows) of the block that begins at query `first`, against all keys.
  void strip(const Scorer<Acc>& scorer, const Scratch& s, const Operands& x, i64 first, i64 r, i64 rows,
             bool bad_scores) const {
    const i64 i0 = first + r;
    const Interval columns = visible_columns(p, scorer.geometry, {scorer.b, scorer.h, 1, i0, rows}, 0, p.key_length);
    const i64 values = round_up(p.value_dim, kLane);
    i64 begin = 0, end = 0;
    if (!columns.empty()) {
      begin = round_down(columns.low, kWholeColumns<Mode>);
      end = smaller(round_up(columns.high, Mode::kColumnMultiple), keys);
      const i64 steps = depth / Mode::kPair;
      gemm<Mode>(rows, end - begin, depth, s.query + r * kPieces * depth, kPieces * depth, 1,
                 x.keys + begin * kPieces * steps, Mode::kPanel, Mode::kPanel * kPieces * steps, s.scores + begin,
                 score_row(), false, depth, Mode::kPanel * steps);
      if (bad_scores) fix_scores(scorer, s, x, i0, r, rows, smaller(end, p.key_length));
    }
    A* const weights = Mode::kPair == 2 ? s.weights : reinterpret_cast<A*>(s.scores);
    for (i64 n = 0; n < rows; ++n)
      s.ends[n] = softmax(scorer, s, i0 + n, r + n, {begin, end}, s.scores + n * score_row(),
                          weights + n * weight_row(), s.maximum + n);
    if (p.value_dim > 0) {
      if (begin == end) std::memset(s.accumulator, 0, rows * value_width * sizeof(Acc));
      const i64 value_piece = keys / Mode::kPair * Mode::kPanel;
      for (i64 j = begin; j < end; j += kStretch)
        gemm<Mode>(rows, values, smaller(kStretch, end - j), weights + j, weight_row(), 1,
                   x.values + j / Mode::kPair * Mode::kPanel, Mode::kPanel, kPieces * value_piece, s.accumulator,
                   value_width, j > begin, keys, value_piece);
      if (x.any[1]) fix_values(scorer, s, x, i0, rows, begin, smaller(end, p.key_length), weights);
    }
    for (i64 n = 0; n < rows; ++n)
      finish_row(scorer, o, i0 + n, s.maximum[n], s.ends[n], s.accumulator + n * value_width, values);
  }

  // Row i: scores become exponentials, as numbers and as an operand, zero where nothing is seen of the strip's columns;
  // the weights go where they belong.
  RowEnd<Acc> softmax(const Scorer<Acc>& scorer, const Scratch& s, i64 i, i64 row_of_block, Interval columns,
                      Acc* score, A* weight, Acc* maximum) const {
    Interval live{columns.low, columns.low};
    if (!columns.empty()) live = scorer.apply(i, 0, columns.low, columns.high, score, s.temp, nullptr);
    Acc sum = 0;
    *maximum = -kInfinity<Acc>;
    if (!live.empty()) {
      *maximum = row_max(score, live.low, live.high);
      const Acc reference = *maximum == -kInfinity<Acc> ? Acc(0) : *maximum;
      sum = reduce_add<Acc>(
          scorer.plain ? row_exp<true, Mode::kExpDegree>(score, live.low, live.high, reference, scorer.factor)
                       : row_exp<false, Mode::kExpDegree>(score, live.low, live.high, reference, scorer.factor));
      if (p.dropout_p > 0) {
        scorer.dropout_factors(i, 0, live.low, live.high, s.temp);
        for (i64 j = live.low; j < live.high; ++j) score[j] *= s.temp[j];
      }
      to_operand<Mode>(score + live.low, live.high - live.low, weight + live.low, keys);
    }
    for (A* part = weight; part < weight + kPieces * keys; part += keys) {
      if (columns.low < live.low) std::memset(part + columns.low, 0, (live.low - columns.low) * sizeof(A));
      if (live.high < columns.high) std::memset(part + live.high, 0, (columns.high - live.high) * sizeof(A));
    }
    const RowEnd<Acc> end = row_end(scorer, *maximum, sum);
    if (sum != sum) {
      without_numbers(scorer, s, i, row_of_block, live);
    } else if (w.average) {
      Acc* const average = s.average + row_of_block * keys;
      const Acc share = end.scale / static_cast<Acc>(p.query_heads);
      for (i64 j = live.low; j < live.high; j += kLane) store(average + j, load(average + j) + load(score + j) * share);
    } else {
      std::memset(s.temp, 0, live.low * sizeof(Acc));
      for (i64 j = live.low; j < live.high; j += kLane) store(s.temp + j, load(score + j) * end.scale);
      std::memset(s.temp + live.high, 0, (keys - live.high) * sizeof(Acc));
      store_weights(s.temp, scorer.b, scorer.h, i);
    }
    return end;
  }

  // The weights of a row that sees NaN or +inf: NaN where it sees anything, 0 elsewhere.
  void without_numbers(const Scorer<Acc>& scorer, const Scratch& s, i64 i, i64 row_of_block, Interval live) const {
    Acc* const row = s.temp + keys;
    std::memset(row, 0, keys * sizeof(Acc));
    for (i64 j = live.low; j < smaller(live.high, p.key_length); ++j) {
      const bool kept = p.dropout_p == 0 || s.temp[j] != 0;
      if (kept && scorer.visible(i, j)) row[j] = static_cast<Acc>(__builtin_nan(""));
    }
    if (!w.average) return store_weights(row, scorer.b, scorer.h, i);
    Acc* const average = s.average + row_of_block * keys;
    for (i64 j = 0; j < keys; j += kLane) store(average + j, load(average + j) + load(row + j));
  }

  // A row of weights in the order of the caller's columns.
  void store_weights(const Acc* row, i64 b, i64 h, i64 i) const {
    const i64 own = p.key_length - w.leading;
    store_row(w.view.dtype, row + w.leading, own, w.view.mutable_at(b, h, i));
    if (w.leading) store_row(w.view.dtype, row, w.leading, w.view.mutable_at(b, h, i, own));
  }

  // Scores of visible pairs with a flagged query or key, from the original numbers.
  void fix_scores(const Scorer<Acc>& scorer, const Scratch& s, const Operands& x, i64 i0, i64 r, i64 rows,
                  i64 count) const {
    Acc *const key = s.temp, *const query = s.staging;
    const RowSource<Acc> key_rows = key_source(scorer.b, scorer.h / p.group()), query_rows = query_source(scorer);
    for (i64 j = 0; j < count; ++j)
      for (i64 n = 0; n < rows; ++n) {
        if (!(x.key_bad[j] || s.query_bad[r + n]) || !scorer.visible(i0 + n, j)) continue;
        key_rows.load(j, key);
        query_rows.load(i0 + n, query);
        s.scores[n * score_row() + j] = dot(query, key, p.head_dim);
      }
  }

  void fix_values(const Scorer<Acc>& scorer, const Scratch& s, const Operands& x, i64 i0, i64 rows, i64 begin,
                  i64 count, const A* weights) const {
    Acc* const value = s.temp;
    for (i64 j = begin; j < count; ++j) {
      if (!x.value_bad[j]) continue;
      RowSource<Acc>(p.value, scorer.b, scorer.h / p.group()).load(j, value);
      for (i64 n = 0; n < rows; ++n) {
        if (!scorer.visible(i0 + n, j)) continue;
        const Acc weight = number_of<Mode>(weights + n * weight_row() + j, keys);
        for (i64 d = 0; d < p.value_dim; ++d) s.accumulator[n * value_width + d] += weight * value[d];
      }
    }
  }
};

template <class Mode>
inline void weights_forward(const Problem& problem, const ForwardOutput& output, const WeightsOutput& weights,
                            const Parallel& parallel) {
  WeightsForward<Mode>(problem, output, weights).run(parallel);
}

}  // namespace fastattn::cpu::FASTATTN_ISA
