// dQ: a block per tile of query rows of one head, looping over tiles of keys as the forward does.  It also owns what
// is a sum over a query's keys: the slopes' gradient and those of the two ends of the distance table.
#pragma once

#include "content_gradient.h"
#include "score_gradient.h"
#include "tiles.h"

namespace fastattn::cuda {

template <class T_, int kDim_>
struct BackwardQConfig {
  using T = T_;
  static constexpr BackwardQTiles kTiles = backward_q_tiles(kDim_);
  static constexpr int kDim = kDim_, kRows = kTiles.rows, kKeys = kTiles.keys;
  static constexpr int kWarps = kTiles.warps(), kThreads = kTiles.threads();
  static constexpr int kContextAt = kTiles.context_at(), kKeysAt = kTiles.keys_at();
  static_assert(kContextAt + kContextBytes <= kKeysAt);
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
  const int lane = lane_index();

  int tile = block_index() % params.tiles;
  if (p.window_right >= 0) tile = params.tiles - 1 - tile;
  const int b = block_index() / params.tiles / p.heads, h = block_index() / params.tiles % p.heads;
  const int m0 = tile * Config::kRows;
  const RowContext own = row_context(p, b, h, 1, m0, m0 + Config::kRows - 1);
  const int start = larger(own.keys.lo, 0) / kKeys, end = own.keys.hi > 0 ? (own.keys.hi + kKeys - 1) / kKeys : 0;

  const int stages = params.two_stages ? 2 : 1;
  const SharedAddress query_tile = shared_base(), grad_tile = query_tile + RowTile::kBytes;
  const SharedAddress context_at = query_tile + Config::kContextAt;
  const SharedAddress key_tiles = query_tile + Config::kKeysAt, value_tiles = key_tiles + stages * KeyTile::kBytes;
  if (thread_index() == 0) store_context(context_at, own);

  const auto rows_of = [&](const Operand& x, int head, int row) {
    return static_cast<const uint16_t*>(x.data) + b * x.batch + head * x.head + row * x.row;
  };
  const uint16_t* next_keys = rows_of(p.key, h / p.group, start * kKeys);
  const uint16_t* next_values = rows_of(p.value, h / p.group, start * kKeys);
  const auto copy_step = [&](int n) {
    const int stage = (n & (stages - 1)) * KeyTile::kBytes;
    if (n < end) {
      copy_tile<KeyTile, kThreads>(key_tiles + stage, next_keys, p.key.row, p.key_length - n * kKeys, p.head_dim);
      copy_tile<KeyTile, kThreads>(value_tiles + stage, next_values, p.value.row, p.key_length - n * kKeys,
                                   p.value_dim);
      next_keys += kKeys * p.key.row;
      next_values += kKeys * p.value.row;
    }
    copy_async_commit();
  };

  float acc[1][Config::kDim / 8][4];
  clear(acc);
  float slope_sum = 0.0f, left_sum = 0.0f, right_sum = 0.0f;
  const int band0 = warp_index() * 16, row0 = m0 + band0 + lane / 4;
  RowStatistics rows[2];
  FASTATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int i = row0 + 8 * half;
    const i64 row = (static_cast<i64>(b) * p.heads + h) * p.query_length + i;
    const bool inside = i < p.query_length;
    rows[half].largest = inside ? load_constant(params.statistics + 2 * row) : 0.0f;
    rows[half].log_sum = inside ? load_constant(params.statistics + 2 * row + 1) : infinity();
    rows[half].delta = inside ? load_constant(params.delta + row) : 0.0f;
  }
  if (start < end) {
    copy_tile<RowTile, kThreads>(query_tile, rows_of(p.query, h, m0), p.query.row, p.query_length - m0, p.head_dim);
    copy_tile<RowTile, kThreads>(grad_tile, rows_of(params.grad_out, h, m0), params.grad_out.row, p.query_length - m0,
                                 p.value_dim);
    copy_step(start);
  }
  if (params.drow_table) {
    const int columns = p.content.last + 1;
    const i64 row = (static_cast<i64>(b) * p.heads + h) * p.query_length + m0;
    clear_block<kThreads>(params.drow_table + row * columns, columns, smaller(Config::kRows, p.query_length - m0),
                          columns);
  }
  sync_block();  // the context is there, and the table's gradient is zero
  for (int n = start; n < end; ++n) {
    const int stage = (n & (stages - 1)) * KeyTile::kBytes;
    const SharedAddress key_tile = key_tiles + stage, value_tile = value_tiles + stage;
    const int n0 = n * kKeys;
    if (params.two_stages) {
      copy_step(n + 1);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    const RowContext context = load_context(context_at);
    const bool masked = needs_masks(context.keys, n0, n0 + kKeys);
    const bool careful = needs_care(p, masked);
    if (careful) {
      // rows that saw a bad key have a NaN lse or delta already; the others must not meet it again
      zero_non_finite<T, KeyTile, kThreads>(key_tile);
      zero_non_finite<T, KeyTile, kThreads>(value_tile);
    }
    sync_block();

    const Place<> at{row0, n0 + 2 * (lane & 3), context.batch, context.head};
    const Sides sides = sides_of(p, context.first, context.last, n0, n0 + kKeys);
    float s[1][kKeys / 8][4], ds[1][kKeys / 8][4];
    const auto raw = [&](float (&product)[1][kKeys / 8][4]) {
      multiply_rows<T, RowTile, KeyTile>(product, query_tile, band0, key_tile);
    };
    raw(s);
    finish_scores(s, p, context.interval, at, masked, sides);
    multiply_rows<T, RowTile, KeyTile>(ds, grad_tile, band0, value_tile);
    weights_and_gradient(s, ds, p, at, careful, [&](int, int, int r) { return rows[r / 2]; });

    if (params.partial_slopes) {
      each(ds, [&](float& x, int band, int c, int r) {
        const int distance = at.key(band, c, r) - (at.query(band, c, r) + context.interval.offset);
        slope_sum -= x * static_cast<float>(distance < 0 ? -distance : distance);
      });
    }
    if (params.partial_ends) {
      each(ds, [&](float& x, int band, int c, int r) {
        const int distance = at.key(band, c, r) - (at.query(band, c, r) + context.interval.offset);
        if (sides.table == Side::kFarLeft || (sides.table == Side::kNear && distance <= -p.table_left)) {
          left_sum += x;
        } else if (sides.table == Side::kFarRight || distance >= p.table_right) {
          right_sum += x;
        }
      });
    }
    if (params.drow_table) {
      const i64 head = static_cast<i64>(context.batch) * p.heads + context.head;
      add_to_table(ds, p, context.interval, at, sides.content,
                   params.drow_table + head * p.query_length * (p.content.last + 1));
    }
    if (p.softcap_out != 0.0f) through_softcap(ds, s, p, raw);
    uint32_t packed[1][kKeys / 16][4];
    pack_rows<T>(packed, ds);
    accumulate<T, KeyTile>(acc, packed, key_tile);
    sync_block();  // everyone is done with the tile
    if (!params.two_stages) copy_step(n + 1);
  }
  copy_async_wait<0>();

  const RowContext context = load_context(context_at);
  if (params.dquery.data) {
    uint16_t* out = static_cast<uint16_t*>(params.dquery.data) + context.batch * params.dquery.batch +
                    context.head * params.dquery.head;
    FASTATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int i = row0 + 8 * half;
      store_row<T>(out + i * params.dquery.row, acc[0], half, p.scale, 0, p.head_dim, i < p.query_length);
    }
  }
  // tiles are numbered by their rows here, whatever the order they ran in
  const i64 place = (static_cast<i64>(context.batch) * p.heads + context.head) * params.tiles + tile;
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
