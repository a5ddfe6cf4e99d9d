// Gradients by recomputation, tile by tile, without atomics.
//
//   1. Delta_i = sum_d dO O - dlse, and the sink's gradient, per (batch, head); where the weights have a gradient dW of
//      their own, sum_j W (dO V + dW) takes the place of sum_d dO O, in a pass of its own;
//   2. a work item per (batch, key head, chunk of keys): the five products of every tile its keys take part in.
//      dK and dV stay in the item; its dQ is added to those of the chunks before it (ordered_sum.h), parameter
//      gradients go to the item's own row;
//   3. these rows are added in a fixed order.
//
// The number of chunks follows from the shape alone, never from the number of threads, and every sum has one order:
// results are the same bits for any number of threads.
// dK and dV are accumulated transposed, dK^T = Q^T dS: P and dS are then the B operands exactly as they were
// computed, and only the small query tiles are needed in both orientations.
#pragma once

#include "bias_gradient.h"
#include "bias_sum.h"
#include "forward.h"
#include "gradient_tile.h"
#include "ordered_sum.h"

namespace fastattn::cpu::FASTATTN_ISA {

template <class Mode>
class Backward {
 public:
  using Acc = typename Mode::Acc;
  using A = typename Mode::A;
  using B = typename Mode::B;
  using Tile = GradientTile<Mode>;

  Backward(const Problem& problem, const BackwardInput& input, const BackwardOutput& output)
      : p(problem),
        in(input),
        out(output),
        row_delta(p.batch * p.query_heads * p.query_length),
        engine(problem, input, row_delta.data()) {
    const i64 units = larger(p.batch * p.kv_heads, i64{1});
    const i64 tiles = larger(ceil_div(p.key_length, engine.tile), i64{1});
    chunks = smaller(tiles, ceil_div(kItems, units));
    // Every chunk at work has a dQ of its own: as many as fit into so much memory, and one costs nothing.
    const i64 dq_bytes =
        larger(p.batch * p.query_heads * p.query_length * (p.head_dim + row_columns()) * i64{sizeof(Acc)}, i64{1});
    chunks = larger(smaller(chunks, kPartialBytes / dq_bytes), smaller(chunks, ceil_div(kLeastItems, units)));
    chunk_keys = ceil_div(tiles, chunks) * engine.tile;
    chunks = larger(ceil_div(p.key_length, chunk_keys), i64{1});
    dq_width = round_up(larger(p.head_dim, i64{1}), kWholeColumns<Mode>);
    dq_rows = round_up(p.query_length, p.query_length > kRows ? kRows : i64{Mode::kRowMultiple});
    if (!writes_bias()) shared_bias.plan(p, out.ddense_bias, chunks * p.kv_heads);
    products = out.dquery || out.dkey || out.dvalue || out.dslopes || out.dtable || writes_bias() || shared_bias ||
               out.drow_table || out.dcol_table;
    if (out.dquery && chunks > 1)
      dquery.allocate(units, chunks, p.group() * query_tiles(), smaller(dq_rows, kRows) * dq_width);
    if (chunks > 1) partial_rows = Buffer<Acc>((chunks - 1) * p.batch * p.query_heads * p.query_length * row_columns());
    if (out.dslopes) partial_slopes = Buffer<double>(chunks * p.batch * p.query_heads);
    if (out.dtable) partial_table = Buffer<double>(chunks * p.batch * p.query_heads * p.table.size[2]);
    if (out.dsink) partial_sink = Buffer<double>(p.batch * p.query_heads);
    if (p.slopes) near_norms = Buffer<Acc>(p.batch * p.query_heads * query_tiles());
  }

  void run(const Parallel& parallel) {
    const auto each = [&](i64 count, void (*item)(void*, i64)) { parallel.run(count, item, this); };
    if (in.grad_weights.view) sum_rows(parallel);
    each(p.batch * p.query_heads, [](void* self, i64 i) { static_cast<Backward*>(self)->delta_item(i); });
    if (writes_bias()) clear(out.ddense_bias);
    if (shared_bias)
      each(chunks * shared_bias.groups() * p.kv_heads,
           [](void* self, i64 i) { static_cast<Backward*>(self)->group_item(i); });
    else if (products)
      each(chunks * p.batch * p.kv_heads, [](void* self, i64 i) { static_cast<Backward*>(self)->chunk_item(i); });
    if (out.drow_table && chunks > 1)
      each(p.batch * p.query_heads, [](void* self, i64 i) { static_cast<Backward*>(self)->reduce_rows_item(i); });
    reduce_parameters();
    if (shared_bias)
      shared_bias.write(out.ddense_bias, parallel);
    else if (out.ddense_bias && !writes_bias())
      bias_gradient<Mode>(engine, out.ddense_bias, parallel);
  }

 private:
  static constexpr i64 kLane = kLanes<Acc>;
  static constexpr i64 kRows = Tile::kRows;
  static constexpr i64 kPieces = Mode::kPieces;
  static constexpr i64 kDepthRows = Mode::kPair == 1 ? 1 : kTileRegisters ? 32 : 2;  // what gemm's depth is made of
  static constexpr i64 kItems = 32;  // wanted work items: enough for most machines, few enough to keep dQ buffers small
  static constexpr i64 kLeastItems = 8;
  static constexpr i64 kPartialBytes = i64{64} << 20;

  using QueryGradient = typename OrderedSum<Acc>::Array;

  const Problem& p;
  const BackwardInput& in;
  const BackwardOutput& out;
  Buffer<Acc> row_delta;
  Tile engine;
  i64 chunks = 1, chunk_keys = 1, dq_rows = 1, dq_width = 1;
  bool products = false;
  Buffer<Acc> near_norms;  // (B * Hq, tiles of queries): Tile::Near
  OrderedSum<Acc> dquery;  // (B * Hk, group, dq_rows, dq_width) in tiles of queries, if there are several chunks
  BiasSum<Acc> shared_bias;
  Buffer<Acc> partial_rows;  // (chunks - 1, B * Hq, Sq, C): the first chunk's are the gradient itself
  Buffer<double> partial_slopes, partial_table, partial_sink;  // (B * Hq, chunks, ...)

  // A bias with every dimension its own: each element of its gradient is one dS.
  bool writes_bias() const {
    const i64* n = p.dense_bias.size;
    return out.ddense_bias && n[0] == p.batch && n[1] == p.query_heads && n[2] == p.query_length &&
           n[3] == p.key_length;
  }

  i64 query_tiles() const { return ceil_div(p.query_length, kRows); }

  // The keys within reach of one head's slope.  The gradient of the weights, which may be of any size, counts
  // everywhere.
  typename Tile::Near near(const Scorer<Acc>& scorer) {
    const Reach<Acc> reach(scorer);
    if (!reach.ends() || in.grad_weights.view) return {};
    return {reach, near_norms.data() + (scorer.b * p.query_heads + scorer.h) * query_tiles()};
  }

  void find_norms(const Scorer<Acc>& scorer, const Reach<Acc>& reach, Acc* norms, Acc* row) const {
    const i64 b = scorer.b, h = scorer.h, kv_head = h / p.group();
    const Acc keys = reach.key_norm(engine.key_source(b, kv_head), engine.value_source(b, kv_head), row);
    const RowSource<Acc> queries = engine.query_source(b, h, scorer.geometry);
    for (i64 first = 0; first < p.query_length; first += kRows)
      *norms++ = keys * reach.query_norm(queries, first, smaller(kRows, p.query_length - first), row);
  }

  i64 row_columns() const { return out.drow_table ? p.row_table.size[3] : 0; }

  // The gradient of row_table as chunk `chunk` of head h sums it up, (Sq, C).
  Acc* row_gradient(i64 b, i64 h, i64 chunk) {
    if (!out.drow_table) return nullptr;
    if (chunk == 0) return reinterpret_cast<Acc*>(out.drow_table.mutable_at(b, h));
    const i64 size = p.query_length * row_columns();
    return partial_rows.data() + (((chunk - 1) * p.batch + b) * p.query_heads + h) * size;
  }

  static void clear(const View& view) {
    i64 count = element_size(view.dtype);
    for (const i64 n : view.size) count *= n;
    std::memset(view.mutable_at(0), 0, count);
  }

  // Delta as the gradient of a bias of one column, whose dS have no Delta to subtract.
  void sum_rows(const Parallel& parallel) {
    View sums;
    sums.data = row_delta.data();
    sums.dtype = sizeof(Acc) == 8 ? DType::kFloat64 : DType::kFloat32;
    const i64 size[4] = {p.batch, p.query_heads, p.query_length, 1};
    for (i64 stride = 1, d = 3; d >= 0; stride *= size[d--]) sums.size[d] = size[d], sums.stride[d] = stride;
    clear(sums);
    bias_gradient<Mode>(engine, sums, parallel);
  }

  void delta_item(i64 index) {
    const i64 b = index / p.query_heads, h = index % p.query_heads;
    FlushScope flush;
    Arena measure(nullptr);
    const i64 dim = larger(larger(p.head_dim, p.value_dim), i64{1}), width = round_up(dim, kLane);
    const auto layout = [&](Arena& arena, Acc** x, Acc** y) {
      *x = arena.take<Acc>(width), *y = arena.take<Acc>(width);
    };
    Acc *o, *g;
    layout(measure, &o, &g);
    Arena arena(thread_scratch(measure.used()));
    layout(arena, &o, &g);
    const Scorer<Acc> scorer(p, b, h);
    const typename Tile::Near within = near(scorer);
    Acc* const norms = within.norms ? near_norms.data() + index * query_tiles() : nullptr;
    if (norms) find_norms(scorer, within.reach, norms, o);
    std::memset(o, 0, width * sizeof(Acc));
    std::memset(g, 0, width * sizeof(Acc));
    const RowSource<Acc> outputs(in.out, b, h), gradients(in.grad_out, b, h);
    Acc* const result = row_delta.data() + index * p.query_length;
    const double sink = p.sink ? *reinterpret_cast<const Acc*>(p.sink.at(b, h)) : -__builtin_inf();
    double dsink = 0;
    for (i64 i = 0; i < p.query_length; ++i) {
      Acc value = result[i];
      if (!in.grad_weights.view) {
        outputs.load(i, o);
        gradients.load(i, g);
        Vec<Acc> sum = {};
        const Vec<Acc> zero = {};
        for (i64 d = 0; d < width; d += kLane) {
          const Vec<Acc> x = load(o + d);
          sum += x == zero ? zero : x * load(g + d);  // a wholly masked row is 0 whatever its gradient holds
        }
        value = reduce_add<Acc>(sum);
      }
      if (in.grad_lse) value -= *reinterpret_cast<const Acc*>(in.grad_lse.at(b, h, i));
      result[i] = value;
      // where a zero weight would meet a number that is not finite, nothing is passed over
      if (norms && !(all_finite(g, p.value_dim) && all_finite(&value, 1)))
        norms[i / kRows] = static_cast<Acc>(__builtin_nan(""));
      if (out.dsink) {
        const Acc* const statistics = reinterpret_cast<const Acc*>(in.statistics.at(b, h, i));
        const double largest = statistics[0] * (Scorer<Acc>::is_plain(p) ? p.scale : 1.0), scale = statistics[1];
        double share = __builtin_exp(sink - largest + __builtin_log(scale));
        if (scale == 0) share = sink > -__builtin_inf();  // the sink is all that such a row sees
        if (share != 0) dsink -= share * value;
      }
    }
    if (out.dsink) partial_sink.data()[index] = dsink;
  }

  struct Scratch {
    typename Tile::Scratch tile;
    B* key_rows;                      // K as the B operand of dQ = dS K
    A *query_columns, *grad_columns;  // Q^T and dO^T, for paired operands
    A* ds_rows;
    B *weight_pairs, *ds_pairs;
    Acc *dkey, *dvalue, *dquery;  // dK^T, dV^T of the tile; dQ of the group's heads
    Acc* table;
    uint8_t *ignored, *filled;  // tiles of dQ that hold anything
  };

  i64 padded_dim(i64 dim) const { return round_up(larger(dim, i64{1}), 16); }
  i64 ds_stride() const { return tile_row<A>(engine.tile); }  // of dS as an A operand
  i64 pairs_piece() const { return kRows / 2 * engine.stride(); }

  Scratch layout(Arena& arena) const {
    Scratch s;
    s.tile = engine.layout(arena);
    const i64 stride = engine.stride();
    constexpr bool paired = Mode::kPair == 2;
    s.key_rows = arena.take<B>(dq_width * kPieces * engine.tile / Mode::kPair);
    s.query_columns = arena.take<A>(paired ? kRows * kPieces * engine.depth : 0);
    s.grad_columns = arena.take<A>(paired ? kRows * kPieces * engine.value_depth : 0);
    s.ds_rows = arena.take<A>(paired ? Tile::kStrip * kPieces * ds_stride() : 0);
    s.weight_pairs = arena.take<B>(paired ? kPieces * pairs_piece() : 0);
    s.ds_pairs = arena.take<B>(paired ? kPieces * pairs_piece() : 0);
    s.dkey = arena.take<Acc>(padded_dim(p.head_dim) * stride);
    s.dvalue = arena.take<Acc>(padded_dim(p.value_dim) * stride);
    s.dquery = arena.take<Acc>(out.dquery ? p.group() * dq_rows * dq_width : 0);
    s.table = arena.take<Acc>(out.dtable ? p.table.size[2] : 0);
    s.ignored = arena.take<uint8_t>(engine.tile);
    s.filled = arena.take<uint8_t>(p.group() * query_tiles());
    return s;
  }

  // A chunk of the keys of all batch elements that share a sum of the bias's gradient.
  void group_item(i64 index) {
    const i64 kv_head = index % p.kv_heads, group = index / p.kv_heads % shared_bias.groups();
    const i64 chunk = index / p.kv_heads / shared_bias.groups();
    for (i64 h = kv_head * p.group(); h < (kv_head + 1) * p.group(); ++h)
      shared_bias.clear(group, h, chunk * chunk_keys, smaller((chunk + 1) * chunk_keys, p.key_length));
    for (i64 b = shared_bias.first(group); b < shared_bias.last(group); ++b)
      chunk_item((chunk * p.batch + b) * p.kv_heads + kv_head);
  }

  void chunk_item(i64 index) {
    const i64 units = p.batch * p.kv_heads;
    const i64 chunk = index / units, b = index % units / p.kv_heads, kv_head = index % p.kv_heads;
    Arena measure(nullptr);
    layout(measure);
    Arena arena(thread_scratch(measure.used()));
    const Scratch s = layout(arena);
    FlushScope flush;
    TileScope<Mode> tiles;
    const i64 group = p.group(), head = kv_head * group;

    const i64 unit = index % units;
    const bool first_of_many = chunks > 1 && chunk == 0 && out.dquery;
    const QueryGradient dq = first_of_many ? dquery.sum(unit) : QueryGradient{s.dquery, s.filled};
    std::memset(dq.filled, 0, group * query_tiles());
    const auto of_head = [&](QueryGradient all, i64 h) {
      return QueryGradient{all.numbers + (h - head) * dq_rows * dq_width, all.filled + (h - head) * query_tiles()};
    };
    for (i64 h = head; h < head + group; ++h) {
      const i64 at = (b * p.query_heads + h) * chunks + chunk;
      if (out.dslopes) partial_slopes.data()[at] = 0;
      if (out.drow_table) std::memset(row_gradient(b, h, chunk), 0, p.query_length * row_columns() * sizeof(Acc));
      if (out.dtable) std::memset(partial_table.data() + at * p.table.size[2], 0, p.table.size[2] * sizeof(double));
    }
    const i64 last = smaller((chunk + 1) * chunk_keys, p.key_length);
    if (out.dcol_table)
      for (i64 c = 0; c < p.col_table.size[2]; ++c)
        std::memset(out.dcol_table.mutable_at(b, kv_head, c, chunk * chunk_keys), 0,
                    (last - chunk * chunk_keys) * sizeof(Acc));
    for (i64 origin = chunk * chunk_keys; origin < last; origin += engine.tile) {
      const auto keys = engine.pack_keys(s.tile, b, kv_head, origin, smaller(engine.tile, last - origin));
      if (out.dquery)
        pack_depth<Mode>(engine.key_source(b, kv_head), origin, keys.count, keys.padded, dq_width, s.tile.staging,
                         s.key_rows, s.ignored);
      std::memset(s.dkey, 0, padded_dim(p.head_dim) * engine.stride() * sizeof(Acc));
      std::memset(s.dvalue, 0, padded_dim(p.value_dim) * engine.stride() * sizeof(Acc));
      for (i64 h = head; h < head + group; ++h) head_tile(s, keys, h, of_head(dq, h), chunk);
      if (out.dkey) write_columns(s, s.dkey, p.head_dim, keys, out.dkey, true);
      if (out.dvalue) write_columns(s, s.dvalue, p.value_dim, keys, out.dvalue, false);
    }
    if (!out.dquery) return;
    const auto write = [&](QueryGradient all) {
      const BatchGeometry geometry(p, b);
      for (i64 h = head; h < head + group; ++h) {
        const QueryGradient rows = of_head(all, h);
        for (i64 first = 0; first < p.query_length; first += kRows) {
          Acc* row = query_rows(rows, first);
          for (i64 i = first; i < smaller(first + kRows, p.query_length); ++i, row += dq_width)
            write_query(b, h, i, geometry, row);
        }
      }
    };
    if (chunks == 1) return write(dq);
    dquery.add(unit, chunk, dq, [&] { write(dquery.sum(unit)); });
  }

  // A tile's rows of dQ, zeros when it is asked for first.
  Acc* query_rows(QueryGradient dq, i64 first) const {
    Acc* const rows = dq.numbers + first * dq_width;
    uint8_t& filled = dq.filled[first / kRows];
    if (!filled) std::memset(rows, 0, smaller(kRows, dq_rows) * dq_width * sizeof(Acc));
    filled = 1;
    return rows;
  }

  // All queries of one head against one tile of keys.
  void head_tile(const Scratch& s, const typename Tile::Keys& keys, i64 h, QueryGradient dq, i64 chunk) {
    const i64 partial = (keys.b * p.query_heads + h) * chunks + chunk;
    Acc* const drow = row_gradient(keys.b, h, chunk);
    Acc* const dcol =
        out.dcol_table ? reinterpret_cast<Acc*>(out.dcol_table.mutable_at(keys.b, keys.kv_head)) : nullptr;
    const Scorer<Acc> scorer(p, keys.b, h);
    const typename Tile::Near within = near(scorer);
    ParameterSums sums;
    if (out.dtable) std::memset(s.table, 0, p.table.size[2] * sizeof(Acc));
    for (i64 first = 0; first < p.query_length; first += kRows) {
      typename Tile::Span q;
      if (!engine.span(scorer, within, keys, first, smaller(kRows, p.query_length - first), &q)) continue;
      engine.pack_queries(s.tile, scorer, &q);
      const auto row = [&](i64 i, const Acc* ds) {
        const Interval seen = scorer.clip(i, keys.origin, q.begin, q.end);
        if (out.dslopes) add_slope(scorer, i, keys.origin, seen, ds, &sums);
        if (out.dtable) add_table(scorer, i, keys.origin, seen, ds, s.table, &sums);
        if (drow || dcol)
          scorer.content.add_gradient(keys.origin - scorer.geometry.position(i), keys.origin, seen, ds,
                                      drow ? drow + i * row_columns() : nullptr, dcol, p.key_length);
        if (writes_bias() && seen.low < seen.high)
          store_row(out.ddense_bias.dtype, ds + seen.low, seen.high - seen.low,
                    out.ddense_bias.mutable_at(keys.b, h, i, keys.origin + seen.low));
        if (shared_bias) shared_bias.add(shared_bias.row(keys.b, h, i) + keys.origin, ds, seen.low, seen.high);
      };
      Acc* const rows_of_dq = out.dquery ? query_rows(dq, first) : nullptr;
      RowRanges ranges;
      engine.compute(
          s.tile, scorer, within, keys, q, row, [&](i64 r, i64 count) { pair_rows(s, q, r, count); },
          [&](const typename Tile::Span& part) {
            ranges.add(part, q);
            if (rows_of_dq) add_query_gradient(s, keys, q, part, rows_of_dq);
          });
      if (out.dkey || out.dvalue) column_products(s, q, ranges);
      if (keys.bad_keys || q.bad_queries || q.bad_grads) {
        Acc* const rows = rows_of_dq ? rows_of_dq : s.tile.staging;  // without dQ the additions go nowhere
        engine.fix_gradients(s.tile, scorer, keys, q, rows, rows_of_dq ? dq_width : 0, s.dkey, s.dvalue);
      }
    }
    if (out.dslopes)
      for (const double lane : sums.slope) partial_slopes.data()[partial] += lane;
    if (out.dtable) {
      const i64 n = p.table.size[2];
      double* const row = partial_table.data() + partial * n;
      for (i64 t = 0; t < n; ++t) row[t] += s.table[t];
      row[0] += sums.before;
      row[n - 1] += sums.after;
    }
  }

  // The rows of a tile of queries that see anything of a panel of its keys: the depth of that panel's dK and dV.
  struct RowRanges {
    static constexpr i64 kPanels = Tile::kMaxTile / Mode::kPanel;
    i64 first[kPanels], last[kPanels];  // none: first > last

    RowRanges() {
      for (i64 n = 0; n < kPanels; ++n) first[n] = Tile::kRows, last[n] = 0;
    }
    void add(const typename Tile::Span& part, const typename Tile::Span& q) {
      for (i64 n = part.begin / Mode::kPanel; n * Mode::kPanel < part.end; ++n) {
        first[n] = smaller(first[n], part.first - q.first);
        last[n] = larger(last[n], part.first - q.first + part.rows);
      }
    }
  };

  // P and dS of two rows of a tile as operands, while they are in the first-level cache: both as a row of pairs, dS
  // also as it is.  An odd last row has a row of zeros for a partner.
  void pair_rows([[maybe_unused]] const Scratch& s, [[maybe_unused]] const typename Tile::Span& q,
                 [[maybe_unused]] i64 row, [[maybe_unused]] i64 count) const {
#if defined(FASTATTN_BF16_OPERANDS)
    if constexpr (Mode::kPair == 2) {
      const i64 stride = engine.stride();
      Acc *const weights = s.tile.scores + row * stride, *const ds = s.tile.products + row * stride;
      if (count == 1)
        for (Acc* const partner : {weights + stride, ds + stride})
          std::memset(partner + q.begin, 0, (q.end - q.begin) * sizeof(Acc));
      A* const ds_row = s.ds_rows + row % Tile::kStrip * kPieces * ds_stride();
      const i64 pair = row / 2 * stride;
      for (i64 j = q.begin; j < q.end; j += Mode::kColumnMultiple)
        store_pairs<kPieces>(weights + j, weights + stride + j, s.weight_pairs + pair + j, pairs_piece());
      for (i64 j = q.begin; j < q.end; j += Mode::kColumnMultiple)
        store_pairs<kPieces>(ds + j, ds + stride + j, s.ds_pairs + pair + j, pairs_piece(), ds_row + j,
                             ds_row + kPieces * ds_stride() + j, ds_stride());
    }
#endif
  }

  // dQ += dS K of a strip, in stretches that end at the same keys whatever columns there are.
  void add_query_gradient(const Scratch& s, const typename Tile::Keys& keys, const typename Tile::Span& q,
                          const typename Tile::Span& part, Acc* dq) const {
    if (part.begin == part.end) return;
    const i64 first = part.first - q.first, key_piece = keys.padded / Mode::kPair * Mode::kPanel;
    const A* ds;
    if constexpr (Mode::kPair == 2)
      ds = s.ds_rows;
    else
      ds = s.tile.products + first * ds_stride();
    constexpr i64 kStretch = kInARow<Mode> * Mode::kPair;
    for (i64 from = part.begin, to; from < part.end; from = to) {
      to = Tile::kTiles ? part.end : smaller(round_down(from, kStretch) + kStretch, part.end);
      gemm<Mode>(part.rows, round_up(p.head_dim, kLane), to - from, ds + from, kPieces * ds_stride(), 1,
                 s.key_rows + from / Mode::kPair * Mode::kPanel, Mode::kPanel, kPieces * key_piece,
                 dq + first * dq_width, dq_width, true, ds_stride(), key_piece);
    }
  }

  // dV^T += dO^T P and dK^T += Q^T dS, panels with the same rows together.
  void column_products(const Scratch& s, const typename Tile::Span& q, const RowRanges& ranges) const {
    const i64 stride = engine.stride();
    const A *query = s.tile.query, *grad = s.tile.grad_out;
    i64 row = 1, query_depth = engine.depth, grad_depth = engine.value_depth;
    if constexpr (Mode::kPair == 2) {
      row = round_up(q.rows, 32);
      const auto turn = [&](A* rows, i64 width, A* columns) {
        std::memset(rows + q.rows * kPieces * width, 0, (row - q.rows) * kPieces * width * sizeof(A));
#if defined(FASTATTN_BF16_OPERANDS)
        transpose_rows<kPieces>(rows, row, width, columns);
#endif
      };
      turn(s.tile.query, engine.depth, s.query_columns);
      turn(s.tile.grad_out, engine.value_depth, s.grad_columns);
      query = s.query_columns, grad = s.grad_columns;
      query_depth = grad_depth = 1;
    }
    for (i64 n = q.begin / Mode::kPanel; n * Mode::kPanel < q.end;) {
      const i64 begin = n * Mode::kPanel, first = ranges.first[n], last = ranges.last[n];
      while (n * Mode::kPanel < q.end && ranges.first[n] == first && ranges.last[n] == last) ++n;
      if (first >= last) continue;
      const i64 columns = smaller(n * Mode::kPanel, q.end) - begin, queries = round_up(last - first, kDepthRows);
      const B *weights, *ds;
      if constexpr (Mode::kPair == 2) {
        weights = s.weight_pairs + first / 2 * stride + begin, ds = s.ds_pairs + first / 2 * stride + begin;
        for (i64 r = round_up(last, 2); r < first + queries; r += 2)  // rows of zeros fill up the depth
          for (B* const pairs : {s.weight_pairs, s.ds_pairs})
            for (i64 piece = 0; piece < kPieces; ++piece)
              std::memset(pairs + piece * pairs_piece() + r / 2 * stride + begin, 0, columns * sizeof(B));
      } else {
        weights = s.tile.scores + first * stride + begin, ds = s.tile.products + first * stride + begin;
      }
      if (out.dvalue)
        gemm<Mode>(p.value_dim, columns, queries, grad + first * grad_depth, kPieces * row, grad_depth, weights, stride,
                   Mode::kPanel, s.dvalue + begin, stride, true, row, pairs_piece());
      if (out.dkey)
        gemm<Mode>(p.head_dim, columns, queries, query + first * query_depth, kPieces * row, query_depth, ds, stride,
                   Mode::kPanel, s.dkey + begin, stride, true, row, pairs_piece());
    }
  }

  struct ParameterSums {
    double slope[kLane] = {};  // lane by lane
    double before = 0, after = 0;
  };

  // sum |d| dS, in whole vectors: dS is zero in what the row does not see of them.
  static void add_slope(const Scorer<Acc>& scorer, i64 i, i64 origin, Interval seen, const Acc* ds,
                        ParameterSums* sums) {
    Vec<Acc> distance = splat(static_cast<Acc>(origin + round_down(seen.low, kLane) - scorer.geometry.position(i)));
    for (int k = 0; k < kLane; ++k) distance[k] += static_cast<Acc>(k);
    Vec<Acc> sum = {};
    for (i64 j = round_down(seen.low, kLane); j < seen.high; j += kLane, distance += static_cast<Acc>(kLane))
      sum += load(ds + j) * vmax(distance, -distance);
    Acc lanes[kLane];
    store(lanes, sum);
    for (int k = 0; k < kLane; ++k) sums->slope[k] -= static_cast<double>(lanes[k]);
  }

  static void add_table(const Scorer<Acc>& scorer, i64 i, i64 origin, Interval seen, const Acc* ds, Acc* table,
                        ParameterSums* sums) {
    i64 shift;
    const Interval near = scorer.table_span(i, origin, seen, &shift);
    sums->before += sum_of(ds, seen.low, near.low);
    sums->after += sum_of(ds, near.high, seen.high);
    for (i64 j = near.low; j < near.high; ++j) table[j + shift] += ds[j];
  }

  void write_query(i64 b, i64 h, i64 i, const BatchGeometry& geometry, Acc* row) const {
    const Acc scale = static_cast<Acc>(p.scale);
    for (i64 d = 0; d < p.head_dim; ++d) row[d] *= scale;
    const RowSource<Acc> source = engine.query_source(b, h, geometry);
    if (source.cosine) source.rotate(i, row, true);
    store_row(out.dquery.dtype, row, p.head_dim, out.dquery.mutable_at(b, h, i));
  }

  void write_columns(const Scratch& s, const Acc* columns, i64 dim, const typename Tile::Keys& keys, const View& target,
                     bool is_key) const {
    const i64 width = padded_dim(dim);
    const Acc scale = static_cast<Acc>(p.scale);
    const RowSource<Acc> source = engine.key_source(keys.b, keys.kv_head);
    for (i64 j = 0; j < keys.count; j += kLane) {
      columns_to_rows(columns, engine.stride(), j, width, s.tile.staging, width);
      for (i64 k = 0; k < smaller(kLane, keys.count - j); ++k) {
        Acc* const row = s.tile.staging + k * width;
        if (is_key) {
          for (i64 d = 0; d < dim; ++d) row[d] *= scale;
          if (source.cosine) source.rotate(keys.origin + j + k, row, true);
        }
        store_row(target.dtype, row, dim, target.mutable_at(keys.b, keys.kv_head, keys.origin + j + k));
      }
    }
  }

  void reduce_rows_item(i64 index) {
    const i64 b = index / p.query_heads, h = index % p.query_heads, size = p.query_length * row_columns();
    Acc* const total = row_gradient(b, h, 0);
    FlushScope flush;
    for (i64 c = 1; c < chunks; ++c) {
      const Acc* const part = row_gradient(b, h, c);
      for (i64 t = 0; t < size; ++t) total[t] += part[t];
    }
  }

  // Sums the rows of `partial` (B * Hq, parts, n) into a gradient of shape (B | 1, Hq, n).
  void reduce(const Buffer<double>& partial, i64 parts, i64 n, const View& target, i64 last_axis) const {
    for (i64 b = 0; b < target.size[0]; ++b)
      for (i64 h = 0; h < p.query_heads; ++h)
        for (i64 t = 0; t < n; ++t) {
          double sum = 0;
          for (i64 from = b; from < (target.size[0] == 1 ? p.batch : b + 1); ++from)
            for (i64 c = 0; c < parts; ++c) sum += partial.data()[((from * p.query_heads + h) * parts + c) * n + t];
          *reinterpret_cast<Acc*>(last_axis == 2 ? target.mutable_at(b, h, t) : target.mutable_at(b, h)) =
              static_cast<Acc>(sum);
        }
  }

  void reduce_parameters() const {
    if (out.dslopes) reduce(partial_slopes, chunks, 1, out.dslopes, 1);
    if (out.dtable) reduce(partial_table, chunks, p.table.size[2], out.dtable, 2);
    if (out.dsink) reduce(partial_sink, 1, 1, out.dsink, 1);
  }
};

// The statistics of the packed forward, for a problem whose forward was another kernel.  Weights recomputed from scores
// that were summed in another order would no longer sum to one: with large scores a rounding of them is a large factor.
template <class Mode>
class Statistics {
 public:
  Statistics(const Problem& p, const BackwardInput& input, const Parallel& parallel)
      : rows_(p.batch * p.query_heads * p.query_length),
        out_(rows_ * p.value_dim * element_size(input.out.dtype)),
        numbers_(2 * rows_) {
    const auto view = [&](void* data, DType dtype, i64 columns) {
      View v;
      v.data = data, v.dtype = dtype;
      const i64 size[4] = {p.batch, p.query_heads, p.query_length, columns};
      for (i64 stride = 1, d = 3; d >= 0; stride *= size[d--]) v.size[d] = size[d], v.stride[d] = stride;
      return v;
    };
    constexpr DType own = sizeof(typename Mode::Acc) == 8 ? DType::kFloat64 : DType::kFloat32;
    ForwardOutput output;
    output.out = view(out_.data(), input.out.dtype, p.value_dim);
    output.statistics = statistics = view(numbers_.data(), own, 2);
    Forward<Mode> kernel(p, output, parallel.threads);
    parallel.run(kernel.items(), &Forward<Mode>::run_item, &kernel);
  }

  View statistics;  // (B, Hq, Sq, 2)

 private:
  i64 rows_;
  Buffer<char> out_;
  Buffer<typename Mode::Acc> numbers_;
};

template <class Mode>
inline void backward(const Problem& problem, const BackwardInput& input, const BackwardOutput& output,
                     const Parallel& parallel) {
  if (decodes<Mode>(problem)) {
    const Statistics<Mode> own(problem, input, parallel);
    BackwardInput consistent = input;
    consistent.statistics = own.statistics;
    Backward<Mode>(problem, consistent, output).run(parallel);
    return;
  }
  Backward<Mode>(problem, input, output).run(parallel);
}

}  // namespace fastattn::cpu::FASTATTN_ISA
