// The heart of the backward: dS of one tile of queries and keys, recomputed from q, k, v, the output gradient and lse.
//     S = Q K^T -> score pipeline -> P = exp(S - max) / sum;   dP = dO V^T;   dS = P (keep dP / (1 - p) - Delta)
// and, where the weights were returned and have a gradient of their own, dP = dO V^T + dW.
// Shared by the gradient of q, k, v and the small parameters (backward.h) and by the gradient of a broadcast dense
// bias (bias_gradient.h).
#pragma once

#include "arena.h"
#include "reach.h"

namespace fastattn::cpu::FASTATTN_ISA {

template <class Mode>
class GradientTile {
 public:
  using Acc = typename Mode::Acc;
  using A = typename Mode::A;
  using B = typename Mode::B;

  static constexpr i64 kLane = kLanes<Acc>;
  static constexpr i64 kBlock = kLanes<B> * Mode::kPair;
  static constexpr bool kTiles = kTileRegisters && Mode::kPair == 2;
  static constexpr i64 kMaxTile = kTiles || sizeof(Acc) == 8 ? 256 : 512;
  static constexpr i64 kPieces = Mode::kPieces;
  static constexpr i64 kStrip = !kTiles ? 12 : kPieces == 1 ? 64 : 32;
  static constexpr i64 kRows = kTiles ? 128 : 96;  // queries of a tile

  const Problem& p;
  const BackwardInput& in;
  const Acc* delta;  // (B, Hq, Sq): sum_d dO O + sum_j W dW - dlse
  i64 tile, depth, value_depth, width, value_width;

  GradientTile(const Problem& problem, const BackwardInput& input, const Acc* row_delta)
      : p(problem), in(input), delta(row_delta) {
    tile = smaller(round_up(larger(p.key_length, i64{1}), Mode::kColumnMultiple), kMaxTile);
    depth = round_up(larger(p.head_dim, i64{1}), Mode::kDepthMultiple);
    value_depth = round_up(larger(p.value_dim, i64{1}), Mode::kDepthMultiple);
    width = round_up(depth, kBlock);
    value_width = round_up(value_depth, kBlock);
  }

  // From one row of keys to the next in scores, products and their pairs.
  i64 stride() const { return tile_row<Acc>(tile); }

  struct Scratch {
    B *keys, *values;        // K^T and V^T, packed
    A *query, *grad_out;     // rows
    Acc *scores, *products;  // S then P (dropout applied); dP then dS
    Acc *staging, *temp, *cap_gradient, *dropout;
    uint8_t *key_bad, *value_bad, *query_bad, *grad_bad;
  };

  Scratch layout(Arena& arena) const {
    Scratch s;
    s.keys = arena.take<B>(round_up(tile, Mode::kPanel) * kPieces * (depth / Mode::kPair));
    s.values = arena.take<B>(round_up(tile, Mode::kPanel) * kPieces * (value_depth / Mode::kPair));
    s.query = arena.take<A>(kRows * kPieces * depth);
    s.grad_out = arena.take<A>(kRows * kPieces * value_depth);
    s.scores = arena.take<Acc>(kRows * stride());
    s.products = arena.take<Acc>(kRows * stride());
    const i64 row = round_up(larger(larger(width, value_width), tile), larger(i64{16}, kWholeColumns<Mode>));
    s.staging = arena.take<Acc>(kPackRows<Mode> * row);
    s.temp = arena.take<Acc>(2 * row);
    s.cap_gradient = arena.take<Acc>(tile);
    s.dropout = arena.take<Acc>(tile);
    s.key_bad = arena.take<uint8_t>(tile);
    s.value_bad = arena.take<uint8_t>(tile);
    s.query_bad = arena.take<uint8_t>(kRows);
    s.grad_bad = arena.take<uint8_t>(kRows);
    return s;
  }

  RowSource<Acc> query_source(i64 b, i64 h, const BatchGeometry& geometry) const {
    return RowSource<Acc>(p.query, b, h).rotated(p.query_cos, p.query_sin, geometry.offset, p.interleaved);
  }
  RowSource<Acc> key_source(i64 b, i64 kv_head) const {
    return RowSource<Acc>(p.key, b, kv_head).rotated(p.key_cos, p.key_sin, 0, p.interleaved);
  }
  RowSource<Acc> value_source(i64 b, i64 kv_head) const { return RowSource<Acc>(p.value, b, kv_head); }
  RowSource<Acc> grad_source(i64 b, i64 h) const { return RowSource<Acc>(in.grad_out, b, h); }

  struct Keys {  // one packed tile of keys
    i64 b, kv_head, origin, count, padded;
    bool bad_keys, bad_values;
  };
  struct Span {  // one tile of queries against it, and the columns any of them sees
    i64 first, rows, begin, end;
    bool bad_queries = false, bad_grads = false;
  };

  Keys pack_keys(const Scratch& s, i64 b, i64 kv_head, i64 origin, i64 count) const {
    Keys k{b, kv_head, origin, count, round_up(count, Mode::kColumnMultiple), false, false};
    k.bad_keys = pack_transposed<Mode>(key_source(b, kv_head), origin, count, k.padded, depth, width, s.staging, s.keys,
                                       s.key_bad);
    k.bad_values = pack_transposed<Mode>(value_source(b, kv_head), origin, count, k.padded, value_depth, value_width,
                                         s.staging, s.values, s.value_bad);
    return k;
  }

  // What a slope puts out of reach (reach.h) has no weight and no gradient.
  struct Near {
    Reach<Acc> reach;
    const Acc* norms = nullptr;  // of each tile of queries times those of the keys, if anything may be out of reach
  };

  // False when no query of the tile sees any of the keys.
  bool span(const Scorer<Acc>& scorer, const Near& near, const Keys& keys, i64 first, i64 rows, Span* out) const {
    Interval columns = visible_columns(p, scorer.geometry, {keys.b, scorer.h, 1, first, rows}, keys.origin, keys.count);
    if (!columns.empty() && near.norms) {
      const Interval seen{keys.origin + columns.low, keys.origin + columns.high};
      const Interval left = near.reach.clip(first, first + rows - 1, seen, near.norms[first / kRows]);
      columns = {left.low - keys.origin, left.high - keys.origin};
    }
    if (columns.empty()) return false;
    *out = Span{first, rows, round_down(columns.low, kWholeColumns<Mode>),
                smaller(round_up(columns.high, Mode::kColumnMultiple), keys.padded)};
    return true;
  }

  void pack_queries(const Scratch& s, const Scorer<Acc>& scorer, Span* q) const {
    q->bad_queries = pack_rows<Mode>(query_source(scorer.b, scorer.h, scorer.geometry), q->first, q->rows, depth,
                                     s.staging, s.query, s.query_bad);
    q->bad_grads = pack_rows<Mode>(grad_source(scorer.b, scorer.h), q->first, q->rows, value_depth, s.staging,
                                   s.grad_out, s.grad_bad);
  }

  // Leaves P (times the dropout factor) in scores and dS, after the softcap's derivative, in products, both zero where
  // a strip sees nothing; calls row(i, dS before the softcap's derivative) for every row of a strip that sees
  // something, two_rows(first, count) for every two rows of the tile, or the last one, when they are done, and
  // strip(span) for every strip.  Strip by strip: scores and products of one stay near until they are weights and dS,
  // and a strip has its own columns, fewer than the tile's under a causal mask.
  template <class RowFunction, class TwoRowsFunction, class StripFunction>
  void compute(const Scratch& s, const Scorer<Acc>& scorer, const Near& near, const Keys& keys, const Span& q,
               RowFunction row, TwoRowsFunction two_rows, StripFunction strip) const {
    for (i64 first = 0; first < q.rows; first += kStrip) {
      const i64 rows = smaller(kStrip, q.rows - first);
      Acc* const scores = s.scores + first * stride();
      Acc* const products = s.products + first * stride();
      Span part;
      if (!span(scorer, near, keys, q.first + first, rows, &part)) part = Span{q.first + first, rows, q.end, q.end};
      for (Acc* const out : {scores, products})
        for (i64 r = 0; r < rows; ++r) {
          if (q.begin < part.begin) std::memset(out + r * stride() + q.begin, 0, (part.begin - q.begin) * sizeof(Acc));
          if (part.end < q.end) std::memset(out + r * stride() + part.end, 0, (q.end - part.end) * sizeof(Acc));
        }
      if (part.begin == part.end) {
        for (i64 r = 0; r < rows; r += 2) two_rows(first + r, smaller(i64{2}, rows - r));
        strip(part);
        continue;
      }
      const auto multiply = [&](const A* a, i64 n, const B* b, Acc* c) {
        const i64 piece = Mode::kPanel * (n / Mode::kPair);
        gemm<Mode>(rows, part.end - part.begin, n, a + first * kPieces * n, kPieces * n, 1,
                   b + part.begin * kPieces * (n / Mode::kPair), Mode::kPanel, kPieces * piece, c + part.begin,
                   stride(), false, n, piece);
      };
      multiply(s.query, depth, s.keys, scores);
      multiply(s.grad_out, value_depth, s.values, products);
      if (keys.bad_keys || keys.bad_values || q.bad_queries || q.bad_grads) fix_products(s, scorer, keys, q, part);
      if (in.grad_weights.view) add_weight_gradient(s, scorer, keys, part, products);
      const bool whole = scorer.sees_all(part.first, part.first + rows - 1, keys.origin, {part.begin, part.end});
      for (i64 r = first; r < first + rows; ++r) {
        Acc* const product = s.products + r * stride();
        const Interval live =
            differentiate_row(s, scorer, keys, q.first + r, part, whole, s.scores + r * stride(), product);
        row(q.first + r, product);
        if (scorer.cap != 0)
          for (i64 j = live.low; j < live.high; j += kLane)
            store(product + j, load(product + j) * load(s.cap_gradient + j));
        if (r % 2 == 1) two_rows(r - 1, 2);
      }
      if (rows % 2 == 1) two_rows(first + rows - 1, 1);
      strip(part);
    }
  }

  // dQ rows, dK and dV columns of the pairs with a flagged key or query, whose packed rows were zeros.
  void fix_gradients(const Scratch& s, const Scorer<Acc>& scorer, const Keys& keys, const Span& q, Acc* dq, i64 dq_row,
                     Acc* dkey, Acc* dvalue) const {
    Acc* const numbers = s.temp;
    for (i64 r = 0; r < q.rows; ++r)
      for (i64 j = q.begin; j < smaller(q.end, keys.count); ++j) {
        const bool any =
            (keys.bad_keys && s.key_bad[j]) || (q.bad_queries && s.query_bad[r]) || (q.bad_grads && s.grad_bad[r]);
        if (!any || !scorer.visible(q.first + r, keys.origin + j)) continue;
        const Acc weight = s.scores[r * stride() + j], ds = s.products[r * stride() + j];
        if (keys.bad_keys && s.key_bad[j]) {
          key_source(keys.b, keys.kv_head).load(keys.origin + j, numbers);
          for (i64 d = 0; d < p.head_dim; ++d) dq[r * dq_row + d] += ds * numbers[d];
        }
        if (q.bad_queries && s.query_bad[r]) {
          query_source(scorer.b, scorer.h, scorer.geometry).load(q.first + r, numbers);
          for (i64 d = 0; d < p.head_dim; ++d) dkey[d * stride() + j] += ds * numbers[d];
        }
        if (q.bad_grads && s.grad_bad[r]) {
          grad_source(scorer.b, scorer.h).load(q.first + r, numbers);
          for (i64 d = 0; d < p.value_dim; ++d) dvalue[d * stride() + j] += weight * numbers[d];
        }
      }
  }

 private:
  // Returns the columns that the row sees, in whole vectors; weights and dS are zero in the rest of the strip's.
  Interval differentiate_row(const Scratch& s, const Scorer<Acc>& scorer, const Keys& keys, i64 i, const Span& part,
                             bool whole, Acc* score, Acc* product) const {
    Acc* const cap_gradient = scorer.cap != 0 ? s.cap_gradient : nullptr;
    Interval live{part.begin, part.end};
    if (whole)
      scorer.score_whole(i, keys.origin, live, score, s.temp, cap_gradient);
    else
      live = scorer.apply(i, keys.origin, part.begin, part.end, score, s.temp, cap_gradient);
    for (Acc* const out : {score, product}) {
      if (part.begin < live.low) std::memset(out + part.begin, 0, (live.low - part.begin) * sizeof(Acc));
      if (live.high < part.end) std::memset(out + live.high, 0, (part.end - live.high) * sizeof(Acc));
    }
    const Acc* factors = nullptr;
    if (p.dropout_p > 0) {
      scorer.dropout_factors(i, keys.origin, live.low, live.high, s.dropout);
      factors = s.dropout;
    }
    const Acc* const statistics = reinterpret_cast<const Acc*>(in.statistics.at(scorer.b, scorer.h, i));
    const Acc row_delta = delta[(scorer.b * p.query_heads + scorer.h) * p.query_length + i];
    if (scorer.plain)
      differentiate<true>(score, product, live.low, live.high, statistics, row_delta, scorer.factor, factors);
    else
      differentiate<false>(score, product, live.low, live.high, statistics, row_delta, scorer.factor, factors);
    return live;
  }

  // s: scores -> weights; dp: dO.V -> dS.  A masked pair is exactly zero in both, whatever the row's statistics and
  // Delta are. The exponent is the forward's own, so that a weight is the one that went into the output.
  template <bool kPlain>
  static void differentiate(Acc* s, Acc* dp, i64 begin, i64 end, const Acc* statistics, Acc row_delta, Acc factor,
                            const Acc* factors) {
    const Vec<Acc> zero = {};
    const Acc largest = statistics[0], scale = statistics[1];
    for (i64 j = begin; j < end; j += kLane) {
      const Vec<Acc> score = load(s + j);
      const Vec<Acc> weight = exp2<Mode::kExpDegree>(exponent<kPlain>(score, largest, factor)) * scale;
      Vec<Acc> gradient = load(dp + j);
      Vec<Acc> kept = weight;
      if (factors) {
        const Vec<Acc> f = load(factors + j);
        gradient = gradient * f;
        kept = weight * f;
      }
      const auto hidden = score == -kInfinity<Acc>;
      store(s + j, hidden ? zero : kept);
      store(dp + j, hidden ? zero : weight * (gradient - row_delta));
    }
  }

  void add_weight_gradient(const Scratch& s, const Scorer<Acc>& scorer, const Keys& keys, const Span& part,
                           Acc* products) const {
    const WeightsOutput& w = in.grad_weights;
    const Acc share = w.average ? Acc(1) / static_cast<Acc>(p.query_heads) : Acc(1);
    const i64 end = smaller(part.end, keys.count);
    const i64 middle = larger(part.begin, smaller(w.leading - keys.origin, end));  // leading keys have the last columns
    for (i64 r = 0; r < part.rows; ++r) {
      const auto add = [&](i64 low, i64 high, i64 first) {
        if (low >= high) return;
        load_row(w.view.dtype, w.view.at(scorer.b, scorer.h, part.first + r, first), w.view.stride[3], high - low,
                 s.temp);
        for (i64 j = low; j < high; ++j) products[r * stride() + j] += s.temp[j - low] * share;
      };
      add(part.begin, middle, p.key_length - w.leading + keys.origin + part.begin);
      add(middle, end, keys.origin + middle - w.leading);
    }
  }

  void fix_products(const Scratch& s, const Scorer<Acc>& scorer, const Keys& keys, const Span& q,
                    const Span& part) const {
    Acc* const left = s.temp;
    Acc* const right = s.staging;
    for (i64 r = part.first - q.first; r < part.first - q.first + part.rows; ++r)
      for (i64 j = part.begin; j < smaller(part.end, keys.count); ++j) {
        const bool score = (keys.bad_keys && s.key_bad[j]) || (q.bad_queries && s.query_bad[r]);
        const bool product = (keys.bad_values && s.value_bad[j]) || (q.bad_grads && s.grad_bad[r]);
        if (!(score || product) || !scorer.visible(q.first + r, keys.origin + j)) continue;
        if (score) {
          query_source(scorer.b, scorer.h, scorer.geometry).load(q.first + r, left);
          key_source(keys.b, keys.kv_head).load(keys.origin + j, right);
          s.scores[r * stride() + j] = dot(left, right, p.head_dim);
        }
        if (product) {
          grad_source(scorer.b, scorer.h).load(q.first + r, left);
          value_source(keys.b, keys.kv_head).load(keys.origin + j, right);
          s.products[r * stride() + j] = dot(left, right, p.value_dim);
        }
      }
  }
};

}  // namespace fastattn::cpu::FASTATTN_ISA
