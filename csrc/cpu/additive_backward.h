// Gradients of additive attention by recomputation, panel by panel of keys, without atomics.  With t = tanh(q + k):
//     dv_j = sum_i p_ij dO_i;        dS = p (keep dP / (1 - dropout) - Delta), as in attention
//     dq_id = w_d sum_j dS_ij (1 - t^2);   dk_jd = w_d sum_i dS_ij (1 - t^2);   dw_d = sum_ij dS_ij t
// all times the scale but dv.  The tanh of a row against a panel is computed once and kept for the second half.
//
//   1. Delta_i = sum_d dO O - dlse;
//   2. a work item per (batch, key head, chunk of keys).  dK and dV stay in the item; dQ goes to the chunk's own
//      buffer, the gradients of weights, slopes and table to the item's own row.  The gradient of a dense bias is a
//      rectangle of the item's, rows and chunk; where batches or heads share the bias, one item does them all;
//   3. the partial sums are added in a fixed order.
//
// The cutting follows from the shape alone, and every sum has one order: results are the same bits for any number of
// threads.  A NaN or an infinity in a row of q, k, v or dO is packed as a number: the rows that do see it have
// statistics or a Delta that are not, and those that do not see it stay clean.
#pragma once

#include "additive_scores.h"

namespace fastattn::cpu::FASTATTN_ISA {

template <class T>
class AdditiveBackward {
 public:
  AdditiveBackward(const Problem& problem, const View& weights, const BackwardInput& input,
                   const BackwardOutput& output, const View& weight_gradient)
      : p(problem),
        weight(weights),
        in(input),
        out(output),
        dweight(weight_gradient),
        panels(p.head_dim),
        value_dim(round_up(larger(p.value_dim, i64{1}), kLane)),
        row_delta(p.batch * p.query_heads * p.query_length) {
    const View& bias = out.ddense_bias;
    own_rows = bias && bias.size[2] == p.query_length;
    own_columns = bias && bias.size[3] == p.key_length;
    own_head = bias && bias.size[1] == p.query_heads;
    batches = bias && bias.size[0] != p.batch ? p.batch : 1;
    heads = bias && !own_head ? p.kv_heads : 1;
    units = larger(p.batch * p.kv_heads / larger(batches * heads, i64{1}), i64{1});
    const i64 count = larger(ceil_div(p.key_length, kWidth), i64{1});
    chunks = smaller(count, ceil_div(kItems, units));
    chunk_keys = ceil_div(count, chunks) * kWidth;
    chunks = larger(ceil_div(p.key_length, chunk_keys), i64{1});
    bias_rows = own_rows ? p.query_length : 1;
    bias_columns = own_columns ? chunk_keys : 1;
    const i64 parts = p.batch * p.query_heads * chunks;
    products = out.dquery || out.dkey || dweight;
    if (out.dquery) partial_dq = Buffer<T>(parts * p.query_length * panels.padded_dim);
    if (dweight) partial_weight = Buffer<double>(parts * p.head_dim);
    if (out.dslopes) partial_slopes = Buffer<double>(parts);
    if (out.dtable) partial_table = Buffer<double>(parts * p.table.size[2]);
    if (bias && !own_columns) partial_bias = Buffer<double>(bias.size[0] * bias.size[1] * chunks * bias_rows);
  }

  void run(const Parallel& parallel) {
    const auto each = [&](i64 count, void (*item)(void*, i64)) { parallel.run(count, item, this); };
    each(p.batch * p.query_heads, [](void* self, i64 i) { static_cast<AdditiveBackward*>(self)->delta_item(i); });
    if (p.batch && p.kv_heads)
      each(units * chunks, [](void* self, i64 i) { static_cast<AdditiveBackward*>(self)->chunk_item(i); });
    else if (out.ddense_bias)
      clear(out.ddense_bias);
    if (out.dquery)
      each(p.batch * p.query_heads * ceil_div(p.query_length, kReduceRows),
           [](void* self, i64 i) { static_cast<AdditiveBackward*>(self)->reduce_item(i); });
    if (dweight) reduce(dweight, partial_weight.data(), p.head_dim, p.scale);
    if (out.dslopes) reduce(out.dslopes, partial_slopes.data(), 1, -1);
    if (out.dtable) reduce(out.dtable, partial_table.data(), p.table.size[2], 1);
    if (out.ddense_bias && !own_columns && p.batch && p.kv_heads) reduce_bias();
  }

 private:
  static constexpr i64 kLane = kLanes<T>, kWidth = AdditivePanels<T>::kWidth;
  static constexpr i64 kVectors = AdditivePanels<T>::kVectorsInPanel;
  static constexpr i64 kItems = 32;  // wanted work items: enough for most machines, few enough to keep dQ buffers small
  static constexpr i64 kReduceRows = 128;
  static constexpr i64 kFlushRows = 64;  // rows whose share of dw is summed in T before it goes to double

  const Problem& p;
  const View& weight;
  const BackwardInput& in;
  const BackwardOutput& out;
  const View& dweight;
  AdditivePanels<T> panels;
  i64 value_dim;  // Dv in whole vectors
  Buffer<T> row_delta;
  bool own_rows, own_columns, own_head, products;
  i64 batches, heads, units, chunks, chunk_keys, bias_rows, bias_columns;
  Buffer<T> partial_dq;                                          // (B * Hq, chunks, Sq, padded D)
  Buffer<double> partial_weight, partial_slopes, partial_table;  // (B * Hq, chunks, ...)
  Buffer<double> partial_bias;                                   // (bias batches, bias heads, chunks, bias_rows)

  static void clear(const View& view) {
    i64 count = element_size(view.dtype);
    for (const i64 n : view.size) count *= n;
    std::memset(view.mutable_at(0), 0, count);
  }

  void delta_item(i64 index) {
    const i64 b = index / p.query_heads, h = index % p.query_heads;
    Arena measure(nullptr);
    measure.take<T>(value_dim), measure.take<T>(value_dim);
    Arena arena(thread_scratch(measure.used()));
    T* const o = arena.take<T>(value_dim);
    T* const g = arena.take<T>(value_dim);
    std::memset(o, 0, value_dim * sizeof(T));
    std::memset(g, 0, value_dim * sizeof(T));
    const RowSource<T> outputs(in.out, b, h), gradients(in.grad_out, b, h);
    for (i64 i = 0; i < p.query_length; ++i) {
      T* const result = row_delta.data() + index * p.query_length + i;
      *result = 0;  // a row without any visible key has no gradient, whatever came in
      if (reinterpret_cast<const T*>(in.statistics.at(b, h, i))[1] == T(0)) continue;
      outputs.load(i, o);
      gradients.load(i, g);
      Vec<T> sum = {};
      for (i64 d = 0; d < value_dim; d += kLane) sum += load(o + d) * load(g + d);
      *result = reduce_add<T>(sum);
      if (in.grad_lse) *result -= *reinterpret_cast<const T*>(in.grad_lse.at(b, h, i));
    }
  }

  struct Scratch {
    T *weight, *panel, *values, *kept, *staging, *temp;
    T *grad_out, *score, *ds, *dropout;
    T *dkey, *dkey_head, *dvalue, *row_dq, *dw;
    double *dw_sum, *bias;
    AdditiveQuery<T> query;
  };

  Scratch layout(Arena& arena) const {
    Scratch s;
    const i64 d = panels.padded_dim;
    s.weight = arena.take<T>(d);
    s.panel = arena.take<T>(panels.panel());
    s.values = arena.take<T>(value_dim * kWidth);
    s.kept = arena.take<T>(d * kWidth);
    s.staging = arena.take<T>(kLane * larger(d, value_dim));
    s.temp = arena.take<T>(larger(larger(kWidth, d), value_dim));
    s.grad_out = arena.take<T>(value_dim);
    s.score = arena.take<T>(kWidth);
    s.ds = arena.take<T>(kWidth);
    s.dropout = arena.take<T>(kWidth);
    s.dkey = arena.take<T>(d * kWidth);
    s.dkey_head = arena.take<T>(d * kWidth);
    s.dvalue = arena.take<T>(value_dim * kWidth);
    s.row_dq = arena.take<T>(d * kLane);
    s.dw = arena.take<T>(d * kLane);
    s.dw_sum = arena.take<double>(d);
    s.bias = arena.take<double>(out.ddense_bias ? bias_size() : 0);
    s.query = AdditiveQuery<T>::take(arena, panels);
    return s;
  }

  // One rectangle for each head of a group, or one for all.
  i64 bias_size() const { return (own_head ? p.group() : 1) * bias_rows * bias_columns; }
  double* bias_of(const Scratch& s, i64 n) const { return s.bias + (own_head ? n : 0) * bias_rows * bias_columns; }

  void chunk_item(i64 index) {
    const i64 chunk = index / units, unit = index % units;
    const i64 head_units = p.kv_heads / heads;
    const i64 b0 = unit / head_units * batches, h0 = unit % head_units * heads;
    Arena measure(nullptr);
    layout(measure);
    Arena arena(thread_scratch(measure.used()));
    Scratch s = layout(arena);
    FlushScope flush;
    if (out.ddense_bias) std::memset(s.bias, 0, bias_size() * sizeof(double));
    for (i64 b = b0; b < b0 + batches; ++b)
      for (i64 kv_head = h0; kv_head < h0 + heads; ++kv_head) key_head(s, b, kv_head, chunk);
    if (out.ddense_bias) store_bias(s, b0, h0, chunk);
  }

  void key_head(Scratch& s, i64 b, i64 kv_head, i64 chunk) {
    const i64 group = p.group(), head = kv_head * group;
    for (i64 h = head; h < head + group; ++h) {
      const i64 at = (b * p.query_heads + h) * chunks + chunk;
      if (out.dquery) std::memset(dq_row(at, 0), 0, p.query_length * panels.padded_dim * sizeof(T));
      if (dweight) std::memset(partial_weight.data() + at * p.head_dim, 0, p.head_dim * sizeof(double));
      if (out.dslopes) partial_slopes.data()[at] = 0;
      if (out.dtable) std::memset(partial_table.data() + at * p.table.size[2], 0, p.table.size[2] * sizeof(double));
    }
    const RowSource<T> keys(p.key, b, kv_head), values(p.value, b, kv_head);
    const i64 last = smaller((chunk + 1) * chunk_keys, p.key_length);
    for (i64 origin = chunk * chunk_keys; origin < last; origin += kWidth) {
      const i64 count = smaller(kWidth, last - origin);
      panels.pack(keys, origin, count, true, s.staging, s.panel);
      pack_values(s, values, origin, count);
      std::memset(s.dkey, 0, panels.table() * sizeof(T));
      std::memset(s.dvalue, 0, value_dim * kWidth * sizeof(T));
      for (i64 h = head; h < head + group; ++h) head_panel(s, b, h, origin, count, chunk, bias_of(s, h - head));
      if (out.dkey) store_columns(s, s.dkey, p.head_dim, out.dkey, b, kv_head, origin, count);
      if (out.dvalue) store_columns(s, s.dvalue, p.value_dim, out.dvalue, b, kv_head, origin, count);
    }
  }

  T* dq_row(i64 part, i64 i) const { return partial_dq.data() + (part * p.query_length + i) * panels.padded_dim; }

  // Values as columns, [value_dim][kWidth].
  void pack_values(const Scratch& s, const RowSource<T>& values, i64 origin, i64 count) const {
    for (i64 j = 0; j < kWidth; j += kLane) {
      for (i64 l = 0; l < kLane; ++l) {
        T* const row = s.staging + l * value_dim;
        const bool there = j + l < count;
        if (there) load_finite(values, origin + j + l, row);
        const i64 kept = there ? p.value_dim : 0;
        std::memset(row + kept, 0, (value_dim - kept) * sizeof(T));
      }
      for (i64 d = 0; d < value_dim; d += kLane) {
        Vec<T> v[kLane];
#pragma GCC unroll 16
        for (int l = 0; l < kLane; ++l) v[l] = load(s.staging + l * value_dim + d);
        transpose<T>(v);
#pragma GCC unroll 16
        for (int l = 0; l < kLane; ++l) store(s.values + (d + l) * kWidth + j, v[l]);
      }
    }
  }

  static void load_finite(const RowSource<T>& source, i64 row, T* to) {
    source.load(row, to);
    if (!all_finite(to, source.columns))
      for (i64 d = 0; d < source.columns; ++d) to[d] = to[d] - to[d] == T(0) ? to[d] : T(0);
  }

  // All queries of one head against one panel of keys.
  void head_panel(Scratch& s, i64 b, i64 h, i64 origin, i64 count, i64 chunk, double* bias) {
    const Scorer<T> scorer(p, b, h);
    const i64 part = (b * p.query_heads + h) * chunks + chunk, row = (b * p.query_heads + h) * p.query_length;
    const RowSource<T> queries(p.query, b, h), gradients(in.grad_out, b, h);
    load_weight(weight, b, h, s.weight);
    std::memset(s.dkey_head, 0, panels.table() * sizeof(T));
    std::memset(s.dw, 0, panels.padded_dim * kLane * sizeof(T));
    i64 summed = 0;
    for (i64 i = 0; i < p.query_length; ++i) {
      if (visible_columns(p, scorer.geometry, {b, h, 1, i, 1}, origin, count).empty()) continue;
      s.query.load_row(panels, queries, i, true);
      additive_scores<true>(panels, s.query, s.weight, s.panel, s.score, s.kept);
      const Interval live = scorer.apply(i, origin, 0, kWidth, s.score, s.temp, static_cast<T*>(nullptr));
      if (live.empty()) continue;
      load_finite(gradients, i, s.grad_out);
      value_products(s);
      for (T* const x : {s.score, s.ds}) {
        std::memset(x, 0, live.low * sizeof(T));
        std::memset(x + live.high, 0, (kWidth - live.high) * sizeof(T));
      }
      if (p.dropout_p > 0) scorer.dropout_factors(i, origin, live.low, live.high, s.dropout);
      const T* const statistics = reinterpret_cast<const T*>(in.statistics.at(b, h, i));
      if (scorer.plain)
        differentiate<true>(s, live, statistics, row_delta.data()[row + i], scorer.factor);
      else
        differentiate<false>(s, live, statistics, row_delta.data()[row + i], scorer.factor);
      const Interval seen = scorer.clip(i, origin, live.low, live.high);
      if (out.dslopes) partial_slopes.data()[part] += weighted_by_distance(scorer, i, origin, seen, s.ds);
      if (out.dtable) add_to_table(scorer, i, origin, seen, s.ds, partial_table.data() + part * p.table.size[2]);
      if (out.ddense_bias) add_to_bias(seen, s.ds, origin % chunk_keys, bias + (own_rows ? i : 0) * bias_columns);
      if (out.dvalue) add_to_values(s);
      if (!products) continue;
      add_products(s);
      if (out.dquery) sum_lanes(s.row_dq, dq_row(part, i));
      if (++summed % kFlushRows == 0) flush_weights(s, part);
    }
    if (summed % kFlushRows) flush_weights(s, part);
    if (out.dkey)
      for (i64 d = 0; d < p.head_dim; ++d) {
        const T factor = scorer.scale * s.weight[d];
        for (i64 j = 0; j < kWidth; ++j) {
          const T sum = s.dkey_head[d * kWidth + j];
          s.dkey[d * kWidth + j] += sum == T(0) ? T(0) : sum * factor;  // nothing seen, whatever the weight is
        }
      }
  }

  // s.ds[j] = sum over d of dO_d v_jd
  void value_products(const Scratch& s) const {
    Vec<T> sum[kVectors] = {};
    for (i64 d = 0; d < p.value_dim; ++d)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[v] += load(s.values + d * kWidth + v * kLane) * s.grad_out[d];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(s.ds + v * kLane, sum[v]);
  }

  // Scores -> weights (dropout applied), dP -> dS.  A masked pair is exactly zero in both, whatever the row's
  // statistics and Delta are.
  template <bool kPlain>
  void differentiate(const Scratch& s, Interval live, const T* statistics, T delta, T factor) const {
    const Vec<T> zero = {};
    const T largest = statistics[0], scale = statistics[1];
    for (i64 j = live.low; j < live.high; j += kLane) {
      const Vec<T> score = load(s.score + j);
      const Vec<T> w = exp2(exponent<kPlain>(score, largest, factor)) * scale;
      Vec<T> gradient = load(s.ds + j), kept = w;
      if (p.dropout_p > 0) {
        gradient *= load(s.dropout + j);
        kept *= load(s.dropout + j);
      }
      const auto hidden = score == -kInfinity<T>;
      // the product with Delta brings back the NaN of an output gradient that was packed as a number
      store(s.score + j, hidden ? zero : kept + delta * T(0));
      store(s.ds + j, hidden ? zero : w * (gradient - delta));
    }
  }

  void add_to_values(const Scratch& s) const {
    Vec<T> w[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) w[v] = load(s.score + v * kLane);
    for (i64 d = 0; d < p.value_dim; ++d)
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        T* const at = s.dvalue + d * kWidth + v * kLane;
        store(at, load(at) + w[v] * s.grad_out[d]);
      }
  }

  // dK of the head in place; dQ's row and dw lane by lane.
  void add_products(const Scratch& s) const {
    Vec<T> ds[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) ds[v] = load(s.ds + v * kLane);
    for (i64 d = 0; d < p.head_dim; ++d) {
      Vec<T> dq = {}, dw = load(s.dw + d * kLane);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vec<T> t = load(s.kept + d * kWidth + v * kLane), through = ds[v] * t;
        const Vec<T> gradient = ds[v] - through * t;
        T* const at = s.dkey_head + d * kWidth + v * kLane;
        store(at, load(at) + gradient);
        dq += gradient;
        dw += through;
      }
      store(s.row_dq + d * kLane, dq);
      store(s.dw + d * kLane, dw);
    }
  }

  // to[d] += the sum of the lanes of vector d, for whole vectors of d.
  template <class Number>
  void sum_lanes(const T* vectors, Number* to) const {
    for (i64 d = 0; d < p.head_dim; d += kLane) {
      Vec<T> v[kLane];
      for (int l = 0; l < kLane; ++l) v[l] = d + l < p.head_dim ? load(vectors + (d + l) * kLane) : Vec<T>{};
      transpose<T>(v);
#pragma GCC unroll 16
      for (int step = kLane / 2; step; step /= 2)
        for (int l = 0; l < step; ++l) v[l] += v[l + step];
      for (int l = 0; l < kLane; ++l) to[d + l] += v[0][l];
    }
  }

  void flush_weights(const Scratch& s, i64 part) {
    if (!dweight) return;
    std::memset(s.dw_sum, 0, panels.padded_dim * sizeof(double));
    sum_lanes(s.dw, s.dw_sum);
    for (i64 d = 0; d < p.head_dim; ++d) partial_weight.data()[part * p.head_dim + d] += s.dw_sum[d];
    std::memset(s.dw, 0, panels.padded_dim * kLane * sizeof(T));
  }

  static double weighted_by_distance(const Scorer<T>& scorer, i64 i, i64 origin, Interval seen, const T* ds) {
    const i64 first = origin - scorer.geometry.position(i);
    double total = 0;
    for (i64 j = seen.low; j < seen.high; ++j) {
      const i64 distance = first + j;
      total += ds[j] * static_cast<double>(distance < 0 ? -distance : distance);
    }
    return total;
  }

  static void add_to_table(const Scorer<T>& scorer, i64 i, i64 origin, Interval seen, const T* ds, double* table) {
    i64 shift;
    const Interval near = scorer.table_span(i, origin, seen, &shift);
    for (i64 j = seen.low; j < near.low; ++j) table[0] += ds[j];
    for (i64 j = near.low; j < near.high; ++j) table[j + shift] += ds[j];
    for (i64 j = near.high; j < seen.high; ++j) table[scorer.table_size - 1] += ds[j];
  }

  void add_to_bias(Interval seen, const T* ds, i64 column, double* row) const {
    if (own_columns)
      for (i64 j = seen.low; j < seen.high; ++j) row[column + j] += ds[j];
    else
      for (i64 j = seen.low; j < seen.high; ++j) row[0] += ds[j];
  }

  // Rows [origin, origin + count) of a gradient, from columns.
  void store_columns(const Scratch& s, const T* columns, i64 dim, const View& to, i64 b, i64 h, i64 origin,
                     i64 count) const {
    for (i64 j = 0; j < count; ++j) {
      for (i64 d = 0; d < dim; ++d) s.temp[d] = columns[d * kWidth + j];
      store_row(to.dtype, s.temp, dim, to.mutable_at(b, h, origin + j));
    }
  }

  void store_bias(const Scratch& s, i64 b0, i64 h0, i64 chunk) {
    const View& bias = out.ddense_bias;
    const i64 b = bias.size[0] == p.batch ? b0 : 0;
    const i64 first = chunk * chunk_keys, count = smaller(chunk_keys, p.key_length - first);
    for (i64 n = 0; n < (own_head ? p.group() : 1); ++n) {
      const i64 h = own_head ? h0 * p.group() + n : 0;
      const double* const sums = bias_of(s, n);
      if (own_columns)
        for (i64 i = 0; i < bias_rows; ++i)
          store_row(bias.dtype, sums + i * bias_columns, count, bias.mutable_at(b, h, i, first));
      else
        std::memcpy(partial_bias.data() + ((b * bias.size[1] + h) * chunks + chunk) * bias_rows, sums,
                    bias_rows * sizeof(double));
    }
  }

  void reduce_bias() const {
    const View& bias = out.ddense_bias;
    Buffer<double> row(bias_rows);
    for (i64 b = 0; b < bias.size[0]; ++b)
      for (i64 h = 0; h < bias.size[1]; ++h) {
        std::memset(row.data(), 0, bias_rows * sizeof(double));
        add_parts(partial_bias.data(), b * bias.size[1] + h, bias_rows, row.data());
        for (i64 i = 0; i < bias_rows; ++i) store_row(bias.dtype, row.data() + i, 1, bias.mutable_at(b, h, i));
      }
  }

  // gradient (B|1, Hq, n) = factor * the sum of its parts over chunks, and over the batch where it has none.
  void reduce(const View& gradient, const double* parts, i64 n, double factor) const {
    Buffer<double> row(n);
    const bool own = gradient.size[0] == p.batch;
    for (i64 b = 0; b < gradient.size[0]; ++b)
      for (i64 h = 0; h < p.query_heads; ++h) {
        std::memset(row.data(), 0, n * sizeof(double));
        for (i64 batch = own ? b : 0; batch < (own ? b + 1 : p.batch); ++batch)
          add_parts(parts, batch * p.query_heads + h, n, row.data());
        for (i64 k = 0; k < n; ++k) row.data()[k] *= factor;
        store_row(gradient.dtype, row.data(), n, gradient.mutable_at(b, h));
      }
  }

  void add_parts(const double* parts, i64 which, i64 n, double* sum) const {
    for (i64 chunk = 0; chunk < chunks; ++chunk)
      for (i64 k = 0; k < n; ++k) sum[k] += parts[(which * chunks + chunk) * n + k];
  }

  // dQ of some rows: the chunks' sums, and what every term of a column shares.
  void reduce_item(i64 index) {
    const i64 blocks = ceil_div(p.query_length, kReduceRows), which = index / blocks;
    const i64 b = which / p.query_heads, h = which % p.query_heads;
    const i64 first = index % blocks * kReduceRows, d = panels.padded_dim;
    Arena measure(nullptr);
    measure.take<T>(d), measure.take<T>(d);
    Arena arena(thread_scratch(measure.used()));
    T* const factor = arena.take<T>(d);
    T* const row = arena.take<T>(d);
    load_weight(weight, b, h, factor);
    for (i64 i = first; i < smaller(first + kReduceRows, p.query_length); ++i) {
      std::memset(row, 0, d * sizeof(T));
      for (i64 chunk = 0; chunk < chunks; ++chunk) {
        const T* const part = dq_row(which * chunks + chunk, i);
        for (i64 k = 0; k < p.head_dim; ++k) row[k] += part[k];
      }
      for (i64 k = 0; k < p.head_dim; ++k)
        row[k] = row[k] == T(0) ? T(0) : row[k] * (static_cast<T>(p.scale) * factor[k]);
      store_row(out.dquery.dtype, row, p.head_dim, out.dquery.mutable_at(b, h, i));
    }
  }
};

template <class T>
inline void additive_backward(const Problem& problem, const View& weight, const BackwardInput& input,
                              const BackwardOutput& output, const View& dweight, const Parallel& parallel) {
  AdditiveBackward<T> kernel(problem, weight, input, output, dweight);
  kernel.run(parallel);
}

}  // namespace fastattn::cpu::FASTATTN_ISA
