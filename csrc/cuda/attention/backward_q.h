// dQ: a block per tile of query rows of one head, looping over tiles of keys as the forward does.  It also owns what
// is a sum over a query's keys: the slopes' gradient and those of the two ends of the distance table.
#pragma once

#include "score_gradient.h"
#include "tiles.h"

namespace fastattn::cuda {

template <class T_, int kDim_>
struct BackwardQConfig {
  using T = T_;
  static constexpr BackwardQTiles kTiles = backward_q_tiles(kDim_);
  static constexpr int kDim = kDim_, kRows = kTiles.rows, kKeys = kTiles.keys;
  static constexpr int kWarps = kTiles.warps(), kThreads = kTiles.threads();
  using RowTile = Tile<kRows, kDim>;
  using KeyTile = Tile<kKeys, kDim>;
};

// Sum over the warps of a block of what its lanes hold, in thread 0.
template <int kWarps>
FASTATTN_DEVICE float block_sum(float x, SharedAddress scratch) {
  for (int step = 16; step; step /= 2) x += shuffle_xor(x, step);
  sync_block();
  if (lane_index() == 0) store_shared(scratch + 4 * warp_index(), x);
  sync_block();
  float total = 0.0f;
  if (thread_index() == 0)
    for (int w = 0; w < kWarps; ++w) total += load_shared<float>(scratch + 4 * w);
  return total;
}

template <class Config>
FASTATTN_DEVICE void attention_backward_q(const BackwardParams& params) {
  using T = typename Config::T;
  using RowTile = typename Config::RowTile;
  using KeyTile = typename Config::KeyTile;
  constexpr int kKeys = Config::kKeys, kThreads = Config::kThreads;
  const Attention& p = params.attention;
  const int lane = lane_index(), warp = warp_index();

  int tile = block_index() % params.tiles;
  if (p.window_right >= 0) tile = params.tiles - 1 - tile;
  const int b = block_index() / params.tiles / p.heads, h = block_index() / params.tiles % p.heads;
  const int m0 = tile * Config::kRows;
  const Interval interval = interval_of(p, b);
  const int first = m0 + interval.offset;
  const int last = smaller(m0 + Config::kRows, p.query_length) - 1 + interval.offset;
  const Range keys = keys_of_queries(p, interval, first, last);
  const int start = larger(keys.lo, 0) / kKeys, end = keys.hi > 0 ? (keys.hi + kKeys - 1) / kKeys : 0;

  const int stages = params.two_stages ? 2 : 1;
  const SharedAddress query_tile = shared_base(), grad_tile = query_tile + RowTile::kBytes;
  const SharedAddress key_tiles = grad_tile + RowTile::kBytes, value_tiles = key_tiles + stages * KeyTile::kBytes;

  const uint16_t* k = static_cast<const uint16_t*>(p.key.data) + b * p.key.batch + h / p.group * p.key.head;
  const uint16_t* v = static_cast<const uint16_t*>(p.value.data) + b * p.value.batch + h / p.group * p.value.head;
  const auto copy_step = [&](int n) {
    const i64 row = static_cast<i64>(n) * kKeys;
    const int stage = (n & (stages - 1)) * KeyTile::kBytes;
    if (n < end) {
      copy_tile<KeyTile, kThreads>(key_tiles + stage, k + row * p.key.row, p.key.row, p.key_length - n * kKeys,
                                   p.head_dim);
      copy_tile<KeyTile, kThreads>(value_tiles + stage, v + row * p.value.row, p.value.row, p.key_length - n * kKeys,
                                   p.value_dim);
    }
    copy_async_commit();
  };

  float acc[1][Config::kDim / 8][4];
  clear(acc);
  float slope_sum = 0.0f, left_sum = 0.0f, right_sum = 0.0f;
  Place<> at{m0 + warp * 16 + lane / 4, 2 * (lane & 3), b, h};
  RowStatistics rows[2];
  FASTATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int i = at.row_at(0, 2 * half);
    const i64 row = (static_cast<i64>(b) * p.heads + h) * p.query_length + i;
    const bool inside = i < p.query_length;
    rows[half].largest = inside ? load_constant(params.statistics + 2 * row) : 0.0f;
    rows[half].log_sum = inside ? load_constant(params.statistics + 2 * row + 1) : infinity();
    rows[half].delta = inside ? load_constant(params.delta + row) : 0.0f;
  }
  if (start < end) {
    const uint16_t* q = static_cast<const uint16_t*>(p.query.data) + b * p.query.batch + h * p.query.head;
    const uint16_t* g =
        static_cast<const uint16_t*>(params.grad_out.data) + b * params.grad_out.batch + h * params.grad_out.head;
    copy_tile<RowTile, kThreads>(query_tile, q + m0 * p.query.row, p.query.row, p.query_length - m0, p.head_dim);
    copy_tile<RowTile, kThreads>(grad_tile, g + m0 * params.grad_out.row, params.grad_out.row, p.query_length - m0,
                                 p.value_dim);
    copy_step(start);
  }
  for (int n = start; n < end; ++n) {
    const int stage = (n & (stages - 1)) * KeyTile::kBytes;
    const SharedAddress key_tile = key_tiles + stage, value_tile = value_tiles + stage;
    const int n0 = n * kKeys;
    at.column = n0 + 2 * (lane & 3);
    if (params.two_stages) {
      copy_step(n + 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    const bool masked = needs_masks(p, keys, n0, n0 + kKeys);
    const bool careful = needs_care(p, masked);
    if (careful) {
      // rows that saw a bad key have a NaN lse or delta already; the others must not meet it again
      zero_non_finite<T, KeyTile, kThreads>(key_tile);
      zero_non_finite<T, KeyTile, kThreads>(value_tile);
    }
    sync_block();

    const Side side = side_of(p, first, last, n0, n0 + kKeys);
    float s[1][kKeys / 8][4], ds[1][kKeys / 8][4];
    const auto raw = [&](float (&product)[1][kKeys / 8][4]) {
      multiply_rows<T, RowTile, KeyTile>(product, query_tile, warp * 16, key_tile);
    };
    raw(s);
    finish_scores(s, p, interval, at, masked, side);
    multiply_rows<T, RowTile, KeyTile>(ds, grad_tile, warp * 16, value_tile);
    weights_and_gradient(s, ds, p, at, careful, [&](int, int, int r) { return rows[r / 2]; });

    if (params.partial_slopes) {
      each(ds, [&](float& x, int band, int c, int r) {
        const int distance = at.key(band, c, r) - (at.query(band, c, r) + interval.offset);
        slope_sum -= x * static_cast<float>(distance < 0 ? -distance : distance);
      });
    }
    if (params.partial_ends) {
      each(ds, [&](float& x, int band, int c, int r) {
        const int distance = at.key(band, c, r) - (at.query(band, c, r) + interval.offset);
        if (side == Side::kFarLeft || (side == Side::kNear && distance <= -p.table_left)) {
          left_sum += x;
        } else if (side == Side::kFarRight || distance >= p.table_right) {
          right_sum += x;
        }
      });
    }
    if (p.softcap_out != 0.0f) through_softcap(ds, s, p, raw);
    uint32_t packed[1][kKeys / 16][4];
    pack_rows<T>(packed, ds);
    accumulate<T, KeyTile>(acc, packed, key_tile);
    sync_block();  // everyone is done with the tile
    if (!params.two_stages) copy_step(n + 1);
  }
  copy_async_wait<0>();

  if (params.dquery.data) {
    uint16_t* out = static_cast<uint16_t*>(params.dquery.data) + b * params.dquery.batch + h * params.dquery.head;
    FASTATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int i = at.row_at(0, 2 * half);
      store_row<T>(out + i * params.dquery.row, acc[0], half, p.scale, 0, p.head_dim, i < p.query_length);
    }
  }
  // tiles are numbered by their rows here, whatever the order they ran in
  const i64 place = (static_cast<i64>(b) * p.heads + h) * params.tiles + tile;
  if (params.partial_slopes) {
    const float total = block_sum<Config::kWarps>(slope_sum, query_tile);
    if (thread_index() == 0) store_global(params.partial_slopes + place, total);
  }
  if (params.partial_ends) {
    const float left = block_sum<Config::kWarps>(left_sum, query_tile);
    const float right = block_sum<Config::kWarps>(right_sum, query_tile);
    if (thread_index() == 0) {
      store_global(params.partial_ends + 2 * place, left);
      store_global(params.partial_ends + 2 * place + 1, right);
    }
  }
}

}  // namespace fastattn::cuda
