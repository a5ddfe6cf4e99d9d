// Tiled attention with an online softmax.
//
// A work item is a block of query rows of one (batch, key head): rows of one query head, or, for short queries, of
// several heads of the group, which then share every packed tile.  It walks over the tiles of keys its rows can
// see; each tile is packed once and meets the rows in strips whose scores stay in cache:
//     S = Q K^T -> score pipeline -> P = exp(S - max), rescale -> acc += P V.
// Row results do not depend on how rows are grouped into items: tile borders are multiples of the tile width.
#pragma once

#include "arena.h"
#include "decode.h"
#include "reach.h"

namespace fastattn::cpu::FASTATTN_ISA {

template <class Mode>
class Forward {
 public:
  using Acc = typename Mode::Acc;
  using A = typename Mode::A;
  using B = typename Mode::B;

  // A strip's scores stay in the first-level cache between the two products and the softmax; a wide tile costs fewer
  // passes over the accumulator.  Tile registers want more rows at once.
  static constexpr bool kTiles = kTileRegisters && Mode::kPair == 2;
  static constexpr i64 kMaxTile = kTiles || sizeof(Acc) == 8 ? 256 : Mode::kPair == 2 ? 1024 : 512;
  static constexpr i64 kStrip = kTiles ? 32 : 12, kShortStrip = kTiles ? 32 : 16;
  static constexpr i64 kWholeStrips = kTiles ? 64 : 48;
  // Where a strip's columns begin and end.
  static constexpr i64 kColumns = !kTiles && Mode::kPair == 2 ? kLanes<Acc> : Mode::kColumnMultiple;
  // Keys that weigh_chunks() takes at a time, and of a tile that it meets: the weights in pieces of more are too many.
  static constexpr i64 kChunk = Mode::kPieces == 1 ? 64 : 32, kChunkedTile = Mode::kPieces == 1 ? 256 : 128;

  Forward(const Problem& problem, const ForwardOutput& output, i64 threads) : p(problem), o(output) {
    // strips that are the same however many threads there are: the choice shows in the last bits
    own_strips = p.group() == 1 || p.query_length >= kSharedQueries;
    chunked = kTiles && Scorer<Acc>::may_share_bias(p) && own_strips;
    const i64 widest = chunked ? kChunkedTile : narrow() ? 2 * kMaxTile : kMaxTile;
    tile = smaller(round_up(larger(p.key_length, i64{1}), Mode::kColumnMultiple), widest);
    depth = round_up(p.head_dim, Mode::kDepthMultiple);
    width = round_up(larger(depth, i64{1}), kBlock);
    value_width = round_up(larger(p.value_dim, i64{1}), kWholeColumns<Mode>);
    choose_blocks(threads);
    strip_rows = rows_per_block * heads_per_block <= kShortStrip ? kShortStrip : kStrip;
  }

  i64 items() const { return p.batch * p.kv_heads * head_blocks * row_blocks; }

  ForwardPlan plan() const {
    Arena measure(nullptr);
    layout(measure);
    return {rows_per_block, heads_per_block, tile, items(), static_cast<i64>(measure.used())};
  }

  static void run_item(void* self, i64 index) { static_cast<const Forward*>(self)->run(index); }

 private:
  static constexpr i64 kLane = kLanes<Acc>;
  static constexpr i64 kBlock = kLanes<B> * Mode::kPair;      // transposed block of pack_transposed
  static constexpr i64 kMaxHeads = 16, kSharedQueries = 256;  // of an item with several heads
  static constexpr i64 kPieces = Mode::kPieces;

  const Problem& p;
  const ForwardOutput& o;
  i64 tile, depth, width, value_width, strip_rows;
  bool own_strips;  // whether strips have rows of one head, and are the same however many threads there are
  bool chunked;     // whether weigh_chunks() may be taken
  i64 rows_per_block = 1, row_blocks = 1, heads_per_block = 1, head_blocks = 1;

  // Whether a window is so narrow that a strip meets most often one tile of twice the width, and its rows few tiles:
  // then wider tiles and larger blocks cost no cache and save packing and passes.
  bool narrow() const {
    return !kTiles && p.window_left >= 0 && p.window_right >= 0 && p.window_left < kMaxTile - p.window_right;
  }

  // Large blocks amortise packing; small ones balance threads.
  void choose_blocks(i64 threads) {
    const i64 group = p.group();
    const i64 queries = larger(p.query_length, i64{1});
    const i64 units = larger(p.batch * p.kv_heads, i64{1});
    // whole strips, so that the strips are the same however many threads there are
    rows_per_block = smaller(queries, i64{21 * kWholeStrips} * (narrow() ? 2 : 1));
    const auto count = [&] { return units * group * ceil_div(queries, rows_per_block); };
    while (rows_per_block > 64 && count() < 4 * threads) rows_per_block = round_up(rows_per_block / 2, kWholeStrips);
    // alike, or the last one packs all keys for a few rows
    rows_per_block = smaller(queries, round_up(ceil_div(queries, ceil_div(queries, rows_per_block)), kWholeStrips));
    row_blocks = ceil_div(queries, rows_per_block);
    if (row_blocks == 1)
      while (heads_per_block < group && heads_per_block < kMaxHeads && heads_per_block * queries < kSharedQueries &&
             units * ceil_div(group, heads_per_block + 1) >= smaller(threads, units * group))
        ++heads_per_block;
    head_blocks = ceil_div(group, heads_per_block);
  }

  struct Scratch {
    Scorer<Acc>* scorers;
    A* query;
    Acc *accumulator, *reference, *scores, *staging, *temp;
    Acc* sum;  // of each row lane by lane
    A* weights;
    B *keys, *values;
    uint8_t *query_bad, *key_bad, *value_bad;
    uint8_t* begun;  // strips whose accumulators hold something
    Acc* norms;      // of the queries of each strip times those of the keys, at most
    Reach<Acc> reach;
  };

  Scratch layout(Arena& arena) const {
    const i64 rows = round_up(rows_per_block * heads_per_block, strip_rows);
    Scratch s;
    s.scorers = arena.take<Scorer<Acc>>(heads_per_block);
    s.query = arena.take<A>(rows * kPieces * larger(depth, i64{1}));
    s.accumulator = arena.take<Acc>(rows * value_width);
    s.reference = arena.take<Acc>(rows);
    s.sum = arena.take<Acc>(rows * kLane);
    s.scores = arena.take<Acc>(strip_rows * score_row());
    s.weights = Mode::kPair == 2 ? arena.take<A>(strip_rows * weight_row()) : nullptr;
    s.keys = arena.take<B>(round_up(tile, Mode::kPanel) * kPieces * larger(depth / Mode::kPair, i64{1}));
    s.values = arena.take<B>(value_width * kPieces * tile / Mode::kPair);
    const i64 staging_row = larger(larger(width, value_width), tile);
    s.staging = arena.take<Acc>(kPackRows<Mode> * staging_row);
    s.temp = arena.take<Acc>(2 * staging_row);
    s.query_bad = arena.take<uint8_t>(rows);
    s.key_bad = arena.take<uint8_t>(tile);
    s.value_bad = arena.take<uint8_t>(tile);
    s.begun = arena.take<uint8_t>(rows / strip_rows);
    s.norms = p.slopes ? arena.take<Acc>(rows / strip_rows) : nullptr;
    return s;
  }

  i64 score_row() const { return tile_row<Acc>(tile); }
  i64 weight_row() const { return tile_row<A>(kPieces * tile); }

  struct Block {  // the rows of one item: `heads` times `rows`, head-major
    i64 b, kv_head, head, heads, first, rows;
    i64 count() const { return heads * rows; }
    i64 head_of(i64 r) const { return r / rows; }
    i64 query_of(i64 r) const { return first + r % rows; }

    // call(n, head, query) for rows [row, row + count): one division for all of them
    template <class Call>
    FASTATTN_INLINE void each(i64 row, i64 count, Call call) const {
      if (count == 0) return;  // there may be no rows at all
      i64 g = head_of(row), i = query_of(row);
      for (i64 n = 0; n < count; ++n) {
        call(n, g, i);
        if (++i == first + rows) i = first, ++g;
      }
    }
  };

  Block block(i64 index) const {
    // Later rows first: under a causal mask they are the long ones.
    const i64 units = p.batch * p.kv_heads * head_blocks;
    const i64 row_block = row_blocks - 1 - index / units;
    index %= units;
    Block block;
    const i64 head_block = index % head_blocks;
    block.kv_head = index / head_blocks % p.kv_heads;
    block.b = index / head_blocks / p.kv_heads;
    block.head = block.kv_head * p.group() + head_block * heads_per_block;
    block.heads = smaller(heads_per_block, p.group() - head_block * heads_per_block);
    block.first = row_block * rows_per_block;
    block.rows = smaller(rows_per_block, p.query_length - block.first);
    return block;
  }

  RowSource<Acc> query_source(const Block& block, i64 head, const BatchGeometry& geometry) const {
    return RowSource<Acc>(p.query, block.b, head).rotated(p.query_cos, p.query_sin, geometry.offset, p.interleaved);
  }

  void run(i64 index) const {
    const Block item = block(index);
    Arena measure(nullptr);
    layout(measure);
    Arena arena(thread_scratch(measure.used()));
    Scratch s = layout(arena);
    FlushScope flush;
    TileScope<Mode> tiles;

    Scorer<Acc>* const scorers = s.scorers;
    bool bad_queries = false;
    for (i64 g = 0; g < item.heads; ++g) {
      new (scorers + g) Scorer<Acc>(p, item.b, item.head + g);
      bad_queries |=
          pack_rows<Mode>(query_source(item, item.head + g, scorers[g].geometry), item.first, item.rows, depth,
                          s.staging, s.query + g * item.rows * kPieces * depth, s.query_bad + g * item.rows);
    }
    const BatchGeometry& geometry = scorers[0].geometry;
    const i64 count = item.count();
    std::memset(s.begun, 0, ceil_div(count, strip_rows));
    std::memset(s.sum, 0, count * kLane * sizeof(Acc));
    for (i64 r = 0; r < count; ++r) s.reference[r] = -kInfinity<Acc>;

    const RowSource<Acc> key_rows =
        RowSource<Acc>(p.key, item.b, item.kv_head).rotated(p.key_cos, p.key_sin, 0, p.interleaved);
    const RowSource<Acc> value_rows(p.value, item.b, item.kv_head);
    if (own_strips) s.reach = Reach<Acc>(scorers[0]);
    if (s.reach.ends()) {
      // of all keys, not of those that this item sees: what a strip passes over must not depend on its item
      const Acc keys = s.reach.key_norm(key_rows, value_rows, s.temp);
      const RowSource<Acc> queries = query_source(item, item.head, geometry);
      for (i64 r = 0; r < count; r += strip_rows)
        s.norms[r / strip_rows] =
            keys * s.reach.query_norm(queries, item.query_of(r), smaller(strip_rows, count - r), s.temp);
    }
    const i64 low = geometry.visible(item.first).low, high = geometry.visible(item.first + item.rows - 1).high;
    for (i64 border = round_down(low, tile); border < high; border += tile) {
      // nobody sees the tile's first keys; where a strip's columns begin must not show where its item's do
      const i64 origin = larger(border, round_down(low, kWholeColumns<Mode>));
      const i64 keys = smaller(border + tile, high) - origin;
      const i64 padded = round_up(keys, Mode::kColumnMultiple);
      if (document_columns(p, item.b, item.first, item.rows, origin, {0, keys}).empty()) continue;
      bool packed = false, bad_keys = false, bad_values = false;
      for (i64 r = 0; r < count; r += strip_rows) {
        const i64 rows = smaller(strip_rows, count - r);
        const Interval columns = strip_columns(item, s, r, rows, origin, keys);
        if (columns.empty()) continue;
        if (!packed) {
          bad_keys = pack_transposed<Mode>(key_rows, origin, keys, padded, depth, width, s.staging, s.keys, s.key_bad);
          bad_values =
              pack_depth<Mode>(value_rows, origin, keys, padded, value_width, s.staging, s.values, s.value_bad);
          packed = true;
        }
        strip(item, scorers, s, r, rows, origin, keys, padded, columns, bad_keys || bad_queries ? &key_rows : nullptr,
              bad_values ? &value_rows : nullptr);
      }
    }
    for (i64 r = 0; r < count; r += strip_rows)
      if (!s.begun[r / strip_rows])
        std::memset(s.accumulator + r * value_width, 0, smaller(strip_rows, count - r) * value_width * sizeof(Acc));
    item.each(0, count, [&](i64 r, i64 g, i64 i) {
      finish_row(scorers[g], o, i, s.reference[r], reduce_add<Acc>(load(s.sum + r * kLane)),
                 s.accumulator + r * value_width, value_width);
    });
  }

  // The first and the last query of a strip, or of the item where it has rows of several heads.
  Interval strip_queries(const Block& item, i64 first_row, i64 rows) const {
    if (item.head_of(first_row) != item.head_of(first_row + rows - 1)) return {item.first, item.first + item.rows - 1};
    return {item.query_of(first_row), item.query_of(first_row + rows - 1)};
  }

  // The columns of a tile that any row of the strip sees and that count.
  Interval strip_columns(const Block& item, const Scratch& s, i64 first_row, i64 rows, i64 origin, i64 keys) const {
    const BatchGeometry& geometry = s.scorers[0].geometry;
    const Interval queries = strip_queries(item, first_row, rows);
    const i64 i0 = queries.low, i1 = queries.high, g = item.head_of(first_row);
    const QueryRows these{item.b, item.head + g, item.head_of(first_row + rows - 1) - g + 1, i0, i1 - i0 + 1};
    const Interval columns = visible_columns(p, geometry, these, origin, keys);
    if (columns.empty() || !s.reach.ends()) return columns;
    const Interval near =
        s.reach.clip(i0, i1, {origin + columns.low, origin + columns.high}, s.norms[first_row / strip_rows]);
    return {near.low - origin, near.high - origin};
  }

  // One strip of rows against some columns of a packed tile.  Non-null sources say that the tile has flagged rows.
  void strip(const Block& item, const Scorer<Acc>* scorers, const Scratch& s, i64 first_row, i64 rows, i64 origin,
             i64 keys, i64 padded, Interval columns, const RowSource<Acc>* bad_keys,
             const RowSource<Acc>* bad_values) const {
    const bool one_head = item.head_of(first_row) == item.head_of(first_row + rows - 1);
    const Interval queries = strip_queries(item, first_row, rows);
    const i64 i0 = queries.low, i1 = queries.high;
    const i64 begin = round_down(columns.low, kColumns), end = smaller(round_up(columns.high, kColumns), padded);

    const Scorer<Acc>& own = scorers[item.head_of(first_row)];
    const bool whole = one_head && own.sees_all(i0, i1, origin, {begin, end});
    Acc shared;
    const bool in_chunks =
        chunked && whole && (end - begin) % kChunk == 0 && own.shares_bias(i0, i1, origin, {begin, end}, &shared);
    if constexpr (kTiles)
      if (in_chunks) weigh_chunks(item, scorers, s, first_row, rows, origin, {begin, end}, padded, shared, bad_keys);
    if (!in_chunks) {
      multiply_keys(s, first_row, rows, {begin, end}, s.scores + begin, score_row());
      if (bad_keys)
        fix_scores(item, scorers, s, first_row, rows, origin, {begin, smaller(end, keys)}, *bad_keys, s.scores + begin,
                   score_row());
      weigh(item, scorers, s, first_row, rows, origin, {begin, end}, whole);
      // the weights of what no row sees are zeros, which only tile registers cannot leave out
      constexpr i64 kStep = kTiles ? kColumns : i64{Mode::kPair};
      const i64 last = smaller(round_up(columns.high, kStep), padded);
      multiply_values(s, first_row, rows, {round_down(columns.low, kStep), last}, origin, padded);
    }
    if (bad_values)
      fix_values(item, scorers, s, first_row, rows, origin, begin, smaller(end, keys), weights_of(s), *bad_values);
  }

  // S = Q K^T of some columns of a tile.
  void multiply_keys(const Scratch& s, i64 first_row, i64 rows, Interval columns, Acc* scores, i64 row) const {
    const A* query = s.query + first_row * kPieces * depth;
    const i64 steps = depth / Mode::kPair;
    for (i64 from = columns.low, to; from < columns.high; from = to) {  // the rest of a panel, then whole ones
      to = from % Mode::kPanel ? smaller(round_up(from, Mode::kPanel), columns.high) : columns.high;
      const i64 inside = from % Mode::kPanel;
      gemm<Mode>(rows, to - from, depth, query, kPieces * depth, 1, s.keys + (from - inside) * kPieces * steps + inside,
                 Mode::kPanel, Mode::kPanel * kPieces * steps, scores + from - columns.low, row, false, depth,
                 Mode::kPanel * steps);
    }
  }

  // acc += P V of some columns of a tile, in stretches that end at the same keys whatever columns there are: those that
  // no row sees must not show in the last bits.
  void multiply_values(const Scratch& s, i64 first_row, i64 rows, Interval columns, i64 origin, i64 padded) const {
    constexpr i64 kStretch = kInARow<Mode> * Mode::kPair;
    const i64 piece = padded / Mode::kPair * Mode::kPanel;
    uint8_t& begun = s.begun[first_row / strip_rows];
    for (i64 from = columns.low, to; from < columns.high; from = to) {
      to = kTiles ? columns.high : smaller(round_down(origin + from, kStretch) + kStretch - origin, columns.high);
      gemm<Mode>(rows, round_up(p.value_dim, kLane), to - from, weights_of(s) + from, weight_row(), 1,
                 s.values + from / Mode::kPair * Mode::kPanel, Mode::kPanel, kPieces * piece,
                 s.accumulator + first_row * value_width, value_width, begun, tile, piece);
      begun = true;
    }
  }

  // Where weights are as wide as scores, they take their place.
  A* weights_of(const Scratch& s) const { return Mode::kPair == 2 ? s.weights : reinterpret_cast<A*>(s.scores); }

  // A row's reference is the largest score of some columns before.  It moves only where weights would otherwise be
  // larger than 2^kSlack: floating point is as exact at any scale, and the sums need no rescaling.
  static constexpr Acc kSlack = 8;
  static constexpr i64 kStates = (kShortStrip + kLane - 1) / kLane * kLane;

  static Acc slack(Acc factor) { return smaller(kSlack / factor, Acc(1e30)); }

  // Of a row that has seen nothing but -inf, whose weights are then zeros.
  static Acc above_nothing(Acc reference) { return reference == -kInfinity<Acc> ? Acc(0) : reference; }

  void rescale(const Scratch& s, i64 row, Acc shrink) const {
    Acc* const sum = s.sum + row * kLane;
    Acc* const acc = s.accumulator + row * value_width;
    store(sum, load(sum) * shrink);
    for (i64 d = 0; d < value_width; d += kLane) store(acc + d, load(acc + d) * shrink);
  }

  void move_reference(Acc factor, const Scratch& s, i64 row, Acc to) const {
    const Acc before = s.reference[row];
    s.reference[row] = to;
    if (before != -kInfinity<Acc>) rescale(s, row, exp2<Mode::kExpDegree>(splat((before - to) * factor))[0]);
  }

  // Scores to weights to sums and accumulators for rows that see all columns and have `shared`, or nothing, added to
  // their q.k.  A few columns at a time: their scores are weights before the first-level cache has lost them.
  void weigh_chunks(const Block& item, const Scorer<Acc>* scorers, const Scratch& s, i64 first_row, i64 rows,
                    i64 origin, Interval columns, i64 padded, Acc shared, const RowSource<Acc>* bad_keys) const {
    const Scorer<Acc>& scorer = scorers[item.head_of(first_row)];
    const Acc scale = scorer.plain ? Acc(1) : scorer.scale, by = scorer.factor * scale;
    alignas(64) Acc from[kStates], limit[kStates];  // what a row's exponents are from; where its reference moves
    const auto take = [&](i64 r) {
      from[r] = (above_nothing(s.reference[first_row + r]) - shared) / scale;
      limit[r] = s.reference[first_row + r] + slack(scorer.factor);
    };
    i64 done = columns.low;  // columns before it are in the accumulators
    for (i64 low = columns.low; low < columns.high; low += kChunk) {
      const Interval chunk{low, low + kChunk};
      multiply_keys(s, first_row, rows, chunk, s.scores, kChunk);
      if (bad_keys) fix_scores(item, scorers, s, first_row, rows, origin, chunk, *bad_keys, s.scores, kChunk);
      if (low == columns.low) {
        begin_rows(s, first_row, rows, scale, shared);
        for (i64 r = 0; r < rows; ++r) take(r);
      }
      const Acc* score = s.scores;
      Acc* sum = s.sum + first_row * kLane;
      A* weight = s.weights + low;
      const i64 step = weight_row(), apart = tile;
      const auto move = [&](i64 r, Vec<Acc> top) __attribute__((noinline)) {
        if (done < low) multiply_values(s, first_row, rows, {done, low}, origin, padded);
        done = low;
        move_reference(scorer.factor, s, first_row + r, reduce_max<Acc>(top));
        take(r);
      };
      for (i64 r = 0; r < rows; ++r, score += kChunk, weight += step, sum += kLane) {
        Vec<Acc> top, weights = row_exp_operand<true, Mode>(score, 0, kChunk, from[r], by, weight, apart, &top);
        top = top * scale + shared;
        if (any_above<Acc>(top, limit[r])) [[unlikely]] {
          move(r, top);
          weights = row_exp_operand<true, Mode>(score, 0, kChunk, from[r], by, weight, apart);
        }
        store(sum, load(sum) + weights);
      }
    }
    multiply_values(s, first_row, rows, {done, columns.high}, origin, padded);
  }

  // The references of rows that have none yet: the largest of a chunk's scores, found side by side.
  void begin_rows(const Scratch& s, i64 first_row, i64 rows, Acc scale, Acc shared) const {
    Acc* const reference = s.reference + first_row;
    if (reference[0] != -kInfinity<Acc>) return;
    Vec<Acc> top[kStates];
    for (i64 r = 0; r < rows; ++r) top[r] = row_max_lanes(s.scores + r * kChunk, 0, kChunk) * scale + shared;
    for (i64 r = rows; r < round_up(rows, kLane); ++r) top[r] = Vec<Acc>{};
    alignas(64) Acc largest[kStates];
    for (i64 r = 0; r < rows; r += kLane) store(largest + r, max_lanes<Acc>(top + r));
    for (i64 r = 0; r < rows; ++r)
      if (reference[r] == -kInfinity<Acc>) reference[r] = largest[r];
  }

  // Scores to weights, zero outside of what a row sees, and the running sums and accumulators with them.
  void weigh(const Block& item, const Scorer<Acc>* scorers, const Scratch& s, i64 first_row, i64 rows, i64 origin,
             Interval columns, bool whole) const {
    Interval live[kStates];
    Acc common[kStates];  // a bias that all keys of the row have; apply()
    Vec<Acc> largest[kStates];
    item.each(first_row, rows, [&](i64 r, i64 g, i64 i) {
      Acc* const score = s.scores + r * score_row();
      if (whole) {
        live[r] = columns;
        largest[r] = scorers[g].apply_whole(i, origin, columns.low, columns.high, score, s.temp, common + r);
      } else {
        live[r] = scorers[g].apply(i, origin, columns.low, columns.high, score, s.temp, nullptr, common + r);
        largest[r] = scorers[g].largest(score, live[r], common[r]);
      }
    });
    for (i64 r = rows; r < round_up(rows, kLane); ++r) largest[r] = Vec<Acc>{};
    const Acc factor = scorers[0].factor;  // of all heads
    alignas(64) Acc before[kStates] = {}, now[kStates], reference[kStates], shrink[kStates];
    std::memcpy(before, s.reference + first_row, rows * sizeof(Acc));
    for (i64 r = 0; r < rows; r += kLane) {  // rows side by side
      const Vec<Acc> zero = {}, none = splat(-kInfinity<Acc>);
      const Vec<Acc> m = load(before + r), here = max_lanes<Acc>(largest + r),
                     top = here > m + slack(factor) ? here : m;
      store(now + r, top);
      store(reference + r, top == none ? zero : top);
      store(shrink + r, m == none ? zero : exp2<Mode::kExpDegree>((m - top) * factor));
    }
    std::memcpy(s.reference + first_row, now, rows * sizeof(Acc));

    A* const weights = weights_of(s);
    item.each(first_row, rows, [&](i64 r, i64 g, i64 i) {
      const i64 row = first_row + r;
      Acc* const sum = s.sum + row * kLane;
      if (now[r] != before[r] && before[r] != -kInfinity<Acc>) rescale(s, row, shrink[r]);  // nothing needs none
      A* const weight = weights + r * weight_row();
      const Interval seen = live[r];
      if (!seen.empty()) {
        bool plain = scorers[g].plain;
        Acc from = reference[r], by = factor;
        if (common[r] == common[r]) {  // the scores are q.k
          plain = true;
          from = (from - common[r]) / scorers[g].scale, by = factor * scorers[g].scale;
        }
        Acc* const score = s.scores + r * score_row();
        store(sum, load(sum) + row_weights(scorers[g], i, s, origin, seen, score, plain, from, by, weight));
      }
      for (i64 piece = 0; piece < kPieces; ++piece) {
        A* const part = weight + piece * tile;
        if (columns.low < seen.low) std::memset(part + columns.low, 0, (seen.low - columns.low) * sizeof(A));
        if (seen.high < columns.high) std::memset(part + seen.high, 0, (columns.high - seen.high) * sizeof(A));
      }
    });
  }

  // The weights of one row as an operand, dropout applied; returns their sum without it, lane by lane.
  FASTATTN_INLINE Vec<Acc> row_weights(const Scorer<Acc>& scorer, i64 i, const Scratch& s, i64 origin, Interval seen,
                                       Acc* score, bool plain, Acc reference, Acc factor, A* weight) const {
    const i64 begin = seen.low, end = seen.high;
#if defined(FASTATTN_BF16_OPERANDS)
    if constexpr (Mode::kPair == 2)
      if (p.dropout_p == 0)
        return plain ? row_exp_operand<true, Mode>(score, begin, end, reference, factor, weight, tile)
                     : row_exp_operand<false, Mode>(score, begin, end, reference, factor, weight, tile);
#endif
    const Vec<Acc> sum = plain ? row_exp<true, Mode::kExpDegree>(score, begin, end, reference, factor)
                               : row_exp<false, Mode::kExpDegree>(score, begin, end, reference, factor);
    if (p.dropout_p > 0) {
      scorer.dropout_factors(i, origin, begin, end, s.temp);
      for (i64 j = begin; j < end; ++j) score[j] *= s.temp[j];
      to_operand<Mode>(score + begin, end - begin, weight + begin, tile);
    }
    return sum;
  }

  // Scores of visible pairs with a flagged query or key, from the original numbers; `scores` begins at the columns.
  void fix_scores(const Block& item, const Scorer<Acc>* scorers, const Scratch& s, i64 first_row, i64 rows, i64 origin,
                  Interval columns, const RowSource<Acc>& source, Acc* scores, i64 row) const {
    Acc* const key = s.temp;
    Acc* const query = s.staging;
    for (i64 j = columns.low; j < columns.high; ++j)
      for (i64 r = 0; r < rows; ++r) {
        if (!s.key_bad[j] && !s.query_bad[first_row + r]) continue;
        const i64 i = item.query_of(first_row + r), g = item.head_of(first_row + r);
        if (!scorers[g].visible(i, origin + j)) continue;
        source.load(origin + j, key);
        query_source(item, item.head + g, scorers[g].geometry).load(i, query);
        scores[r * row + j - columns.low] = dot(query, key, p.head_dim);
      }
  }

  void fix_values(const Block& item, const Scorer<Acc>* scorers, const Scratch& s, i64 first_row, i64 rows, i64 origin,
                  i64 begin, i64 keys, const A* weights, const RowSource<Acc>& source) const {
    Acc* const value = s.temp;
    for (i64 j = begin; j < keys; ++j) {
      if (!s.value_bad[j]) continue;
      source.load(origin + j, value);
      for (i64 r = 0; r < rows; ++r) {
        const i64 row = first_row + r;
        if (!scorers[item.head_of(row)].visible(item.query_of(row), origin + j)) continue;
        const Acc weight = number_of<Mode>(weights + r * weight_row() + j, tile);
        Acc* const acc = s.accumulator + row * value_width;
        for (i64 d = 0; d < p.value_dim; ++d) acc[d] += weight * value[d];
      }
    }
  }
};

template <class Mode>
inline bool decodes(const Problem& problem) {
  return Decode<typename Mode::Acc>::takes(problem, Mode::kPair == 2);
}

template <class Mode>
inline void forward(const Problem& problem, const ForwardOutput& output, const Parallel& parallel) {
  using Few = Decode<typename Mode::Acc>;
  if (decodes<Mode>(problem)) {
    Few kernel(problem, output);
    return parallel.run(kernel.items(), &Few::run_item, &kernel);
  }
  Forward<Mode> kernel(problem, output, parallel.threads);
  parallel.run(kernel.items(), &Forward<Mode>::run_item, &kernel);
}

template <class Mode>
inline ForwardPlan forward_plan(const Problem& problem, i64 threads) {
  using Few = Decode<typename Mode::Acc>;
  if (decodes<Mode>(problem)) return Few(problem, {}).plan();
  return Forward<Mode>(problem, {}, threads).plan();
}

}  // namespace fastattn::cpu::FASTATTN_ISA
