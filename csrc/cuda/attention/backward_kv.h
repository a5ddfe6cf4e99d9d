// dK and dV: a block per tile of keys of one key head, looping over the query rows of every query head that shares it.
//
// Tiles of scores are held transposed, (keys, queries), so that both products take weights and dS from registers as
// their left operand.  One block owns each row of the results: no atomics, one order of summation.  Above D = 128 two
// warps share a band of 16 keys: both compute its scores, each accumulates half of the columns.
#pragma once

#include "content_gradient.h"
#include "score_gradient.h"
#include "tiles.h"

namespace fastattn::cuda {

template <class T_, int kDim_>
struct BackwardKvConfig {
  using T = T_;
  static constexpr BackwardKvTiles kTiles = backward_kv_tiles(kDim_);
  static constexpr int kDim = kDim_, kKeys = kTiles.keys, kQueries = kTiles.queries, kParts = kTiles.parts;
  static constexpr int kThreads = kTiles.threads();
  static_assert(16 * BackwardKvTiles::kWarps / kParts == kKeys);
  using KeyTile = Tile<kKeys, kDim>;
  using RowTile = Tile<kQueries, kDim>;
  static constexpr int kStageBytes = 2 * RowTile::kBytes, kStatisticsBytes = kTiles.statistics_bytes();
};

template <class Config>
FASTATTN_DEVICE void attention_backward_kv(const BackwardParams& params) {
  using T = typename Config::T;
  using RowTile = typename Config::RowTile;
  using KeyTile = typename Config::KeyTile;
  constexpr int kQueries = Config::kQueries, kThreads = Config::kThreads;
  constexpr int kPartColumns = Config::kDim / Config::kParts;
  const Attention& p = params.attention;
  const int lane = lane_index(), warp = warp_index();
  const int part = warp % Config::kParts, band = warp / Config::kParts;

  const int tile = block_index() % params.tiles;
  const int kv_heads = p.heads / p.group;
  const int b = block_index() / params.tiles / kv_heads, kv_head = block_index() / params.tiles % kv_heads;
  const int n0 = tile * Config::kKeys;
  const Interval interval = interval_of(p, b);
  const int last = smaller(n0 + Config::kKeys, p.key_length) - 1;
  Range rows = queries_of_keys(p, interval, n0, n0 + Config::kKeys - 1);
  Range some = queries_of_keys(p, interval, n0, last);
  narrow(rows, p, p.query_spans, b, kv_head * p.group, p.group, n0, last);
  some.lo = larger(some.lo, rows.lo);
  some.hi = smaller(some.hi, rows.hi);
  const int start = larger(some.lo, 0) / kQueries;
  const int end = larger(some.hi > 0 ? (some.hi + kQueries - 1) / kQueries : 0, start);
  const int steps = (end - start) * p.group;  // every tile of rows of one head, then of the next

  const int stages = params.two_stages ? 2 : 1;
  const SharedAddress key_tile = shared_base(), value_tile = key_tile + KeyTile::kBytes;
  const SharedAddress row_tiles = value_tile + KeyTile::kBytes;
  const SharedAddress statistics = row_tiles + stages * Config::kStageBytes;

  const auto copy_step = [&](int step) {
    if (step < steps) {
      const int h = kv_head * p.group + step / (end - start);
      const int m0 = (start + step % (end - start)) * kQueries;
      const SharedAddress to = row_tiles + (step & (stages - 1)) * Config::kStageBytes;
      const SharedAddress to_statistics = statistics + (step & (stages - 1)) * Config::kStatisticsBytes;
      const uint16_t* q = static_cast<const uint16_t*>(p.query.data) + b * p.query.batch + h * p.query.head;
      const uint16_t* g =
          static_cast<const uint16_t*>(params.grad_out.data) + b * params.grad_out.batch + h * params.grad_out.head;
      copy_tile<RowTile, kThreads>(to, q + m0 * p.query.row, p.query.row, p.query_length - m0, p.head_dim);
      copy_tile<RowTile, kThreads>(to + RowTile::kBytes, g + m0 * params.grad_out.row, params.grad_out.row,
                                   p.query_length - m0, p.value_dim);
      const i64 row = (static_cast<i64>(b) * p.heads + h) * p.query_length + m0;
      for (int x = thread_index(); x < 3 * kQueries; x += kThreads) {
        const bool pairs = x < 2 * kQueries;
        const int i = m0 + (pairs ? x / 2 : x - 2 * kQueries);
        copy_async_4(to_statistics + 4 * x,
                     pairs ? params.statistics + 2 * row + x : params.delta + row + (x - 2 * kQueries),
                     i < p.query_length);
      }
    }
    copy_async_commit();
  };

  const auto dcol_table = [&] {  // of this head
    return params.dcol_table + static_cast<i64>(unknown(b * kv_heads + kv_head)) * (p.content.last + 1) * p.key_length;
  };
  if (params.dcol_table)  // zero before the barrier of the first step
    clear_block<kThreads>(dcol_table() + n0, p.key_length, p.content.last + 1,
                          smaller(Config::kKeys, p.key_length - n0));
  float dk[1][kPartColumns / 8][4], dv[1][kPartColumns / 8][4];
  clear(dk);
  clear(dv);
  if (steps > 0) {
    const uint16_t* k = static_cast<const uint16_t*>(p.key.data) + b * p.key.batch + kv_head * p.key.head;
    const uint16_t* v = static_cast<const uint16_t*>(p.value.data) + b * p.value.batch + kv_head * p.value.head;
    copy_tile<KeyTile, kThreads>(key_tile, k + n0 * p.key.row, p.key.row, p.key_length - n0, p.head_dim);
    copy_tile<KeyTile, kThreads>(value_tile, v + n0 * p.value.row, p.value.row, p.key_length - n0, p.value_dim);
    copy_async_commit();
    copy_async_wait<0>();
    // rows that saw a bad key have a NaN lse or delta already; the others must not meet it again
    zero_non_finite<T, KeyTile, kThreads>(key_tile);
    zero_non_finite<T, KeyTile, kThreads>(value_tile);
    copy_step(0);
  }
  Place<true> at{n0 + band * 16 + lane / 4, 0, b, 0};
  for (int step = 0; step < steps; ++step) {
    const int m0 = (start + step % (end - start)) * kQueries;
    at.head = kv_head * p.group + step / (end - start);
    at.column = m0 + 2 * (lane & 3);
    const SharedAddress query_tile = row_tiles + (step & (stages - 1)) * Config::kStageBytes;
    const SharedAddress grad_tile = query_tile + RowTile::kBytes;
    const SharedAddress row_statistics = statistics + (step & (stages - 1)) * Config::kStatisticsBytes;
    if (params.two_stages) {
      copy_step(step + 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    const bool masked = m0 < rows.full_lo || m0 + kQueries > rows.full_hi;
    const bool careful = needs_care(p, masked);
    if (careful) {
      zero_non_finite<T, RowTile, kThreads>(query_tile);
      zero_non_finite<T, RowTile, kThreads>(grad_tile);
    }
    sync_block();

    const int first = m0 + interval.offset;
    const Sides sides = sides_of(p, first, smaller(m0 + kQueries, p.query_length) - 1 + interval.offset, n0, last + 1);
    float s[1][kQueries / 8][4], ds[1][kQueries / 8][4];
    const auto raw = [&](float (&product)[1][kQueries / 8][4]) {
      multiply_rows<T, KeyTile, RowTile>(product, key_tile, band * 16, query_tile);
    };
    raw(s);
    finish_scores(s, p, interval, at, masked, sides);
    multiply_rows<T, KeyTile, RowTile>(ds, value_tile, band * 16, grad_tile);
    weights_and_gradient(s, ds, p, at, careful, [&](int, int n, int r) {
      const int row = 8 * n + 2 * (lane & 3) + (r & 1);
      const Vec2 pair = load_shared<Vec2>(row_statistics + 8 * row);
      return RowStatistics{__builtin_bit_cast(float, pair.x[0]), __builtin_bit_cast(float, pair.x[1]),
                           load_shared<float>(row_statistics + 8 * kQueries + 4 * row)};
    });
    uint32_t packed[1][kQueries / 16][4];
    pack_rows<T>(packed, s);
    accumulate<T, RowTile>(dv, packed, grad_tile, part * (kPartColumns / 16));
    if (params.dcol_table && part == 0) add_to_table(ds, p, interval, at, sides.content, dcol_table());
    if (p.softcap_out != 0.0f) through_softcap(ds, s, p, raw);
    pack_rows<T>(packed, ds);
    accumulate<T, RowTile>(dk, packed, query_tile, part * (kPartColumns / 16));
    sync_block();  // everyone is done with the tile
    if (!params.two_stages) copy_step(step + 1);
  }
  copy_async_wait<0>();

  FASTATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int j = at.row_at(0, 2 * half);
    const bool valid = j < p.key_length;
    if (params.dkey.data) {
      uint16_t* out = static_cast<uint16_t*>(params.dkey.data) + b * params.dkey.batch + kv_head * params.dkey.head;
      store_row<T>(out + j * params.dkey.row, dk[0], half, p.scale, part * kPartColumns, p.head_dim, valid);
    }
    if (params.dvalue.data) {
      uint16_t* out =
          static_cast<uint16_t*>(params.dvalue.data) + b * params.dvalue.batch + kv_head * params.dvalue.head;
      store_row<T>(out + j * params.dvalue.row, dv[0], half, 1.0f, part * kPartColumns, p.value_dim, valid);
    }
  }
}

}  // namespace fastattn::cuda
