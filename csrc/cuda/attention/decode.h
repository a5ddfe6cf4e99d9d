// Attention of few queries over many keys: a block per (part of the keys, key head, batch, 16 rows).
//
// Rows are (query, head of the group) pairs, so that the heads that share a key head read it once.  Each of the four
// warps takes every fourth tile of keys and keeps its own softmax; they meet once, at the end.  K and V are read once
// from memory and the work is bound by that: a warp's copies run one tile ahead, without any block barrier.  The parts
// of one row are joined by `attention_combine`.
#pragma once

#include "forward.h"

namespace fastattn::cuda {

template <class T_, int kDim_>
struct DecodeConfig {
  using T = T_;
  static constexpr DecodeTiles kTiles = decode_tiles(kDim_);
  static constexpr int kDim = kDim_, kRows = DecodeTiles::kRows, kWarps = DecodeTiles::kWarps;
  static constexpr int kThreads = kTiles.threads(), kKeys = kTiles.keys, kStep = kTiles.step();
  using RowTile = Tile<kRows, kDim>;
  using KeyTile = Tile<kKeys, kDim>;
  static constexpr int kWarpBytes = 2 * KeyTile::kBytes;
};

// Zeroes the rows of a warp's value tile that are not finite; which of this lane's two rows see one (bit = half).
template <class Config>
FASTATTN_DEVICE uint32_t isolate_warp_values(SharedAddress value_tile, const float (&s)[1][Config::kKeys / 8][4]) {
  using T = typename Config::T;
  using KeyTile = typename Config::KeyTile;
  uint32_t bad_rows = 0;
  for (int j = 0; j < Config::kKeys; ++j) {
    bool bad = false;
    if (lane_index() < KeyTile::kChunks) {
      const Vec4 chunk = load_shared<Vec4>(value_tile + KeyTile::chunk(j, lane_index()));
      for (int n = 0; n < 4; ++n) bad = bad || finite_or_zero<T>(chunk.x[n]) != chunk.x[n];
    }
    if (any_lane(bad)) {
      bad_rows |= 1u << j;
      if (lane_index() < KeyTile::kChunks)
        store_shared(value_tile + KeyTile::chunk(j, lane_index()), Vec4{{0, 0, 0, 0}});
    }
  }
  sync_warp();
  uint32_t sees = 0;
  FASTATTN_UNROLL
  for (int n = 0; n < Config::kKeys / 8; ++n) {
    FASTATTN_UNROLL
    for (int r = 0; r < 4; ++r)
      if (bad_rows >> (8 * n + 2 * (lane_index() & 3) + (r & 1)) & 1 && s[0][n][r] != -infinity())
        sees |= 1u << (r / 2);
  }
  sees |= shuffle_xor(sees, 1);
  return sees | shuffle_xor(sees, 2);
}

template <class Config>
FASTATTN_DEVICE void attention_decode(const DecodeParams& params) {
  using T = typename Config::T;
  using RowTile = typename Config::RowTile;
  using KeyTile = typename Config::KeyTile;
  constexpr int kKeys = Config::kKeys, kDim = Config::kDim, kRows = Config::kRows, kWarps = Config::kWarps;
  const Attention& p = params.attention;
  const int lane = lane_index(), warp = warp_index();
  const int kv_heads = p.heads / p.group;
  const int split = block_index() % params.splits;
  const int tile = block_index() / params.splits % params.row_tiles;
  const int b = block_index() / params.splits / params.row_tiles / kv_heads;
  const int kv_head = block_index() / params.splits / params.row_tiles % kv_heads;
  const int row0 = tile * kRows, packed_rows = p.query_length * p.group;
  const Interval interval = interval_of(p, b);
  const int first = row0 / p.group + interval.offset;
  const int last = smaller((row0 + kRows - 1) / p.group, p.query_length - 1) + interval.offset;
  const Range keys = keys_of_queries(p, interval, first, last);  // so few queries have no spans
  const int begin = larger(larger(keys.lo, 0) / Config::kStep * Config::kStep, split * params.keys_per_split);
  const int end = smaller(keys.hi, (split + 1) * params.keys_per_split);

  const SharedAddress query_tile = shared_base();
  const SharedAddress merge = query_tile + RowTile::kBytes;
  const SharedAddress key_tile = merge + warp * Config::kWarpBytes, value_tile = key_tile + KeyTile::kBytes;
  const uint16_t* q = static_cast<const uint16_t*>(p.query.data) + b * p.query.batch;
  const uint16_t* k = static_cast<const uint16_t*>(p.key.data) + b * p.key.batch + kv_head * p.key.head;
  const uint16_t* v = static_cast<const uint16_t*>(p.value.data) + b * p.value.batch + kv_head * p.value.head;
  const auto copy_keys = [&](int n0) {
    if (n0 < end) copy_tile<KeyTile, 32>(key_tile, k + n0 * p.key.row, p.key.row, p.key_length - n0, p.head_dim, lane);
    copy_async_commit();
  };
  const auto copy_values = [&](int n0) {
    if (n0 < end)
      copy_tile<KeyTile, 32>(value_tile, v + n0 * p.value.row, p.value.row, p.key_length - n0, p.value_dim, lane);
    copy_async_commit();
  };

  for (int item = thread_index(); item < kRows * RowTile::kChunks; item += Config::kThreads) {
    const int row = item / RowTile::kChunks, column = item % RowTile::kChunks, packed = row0 + row;
    const int i = packed / p.group, h = kv_head * p.group + packed % p.group;
    copy_async_16(query_tile + RowTile::chunk(row, column), q + h * p.query.head + i * p.query.row + column * 8,
                  packed < packed_rows && column * 8 < p.head_dim);
  }
  copy_async_commit();
  const int own = begin + warp * kKeys;
  copy_keys(own);
  copy_values(own);
  copy_async_wait<2>();
  sync_block();  // the queries are there

  RowState<1> state;
  float acc[1][kDim / 8][4];
  clear(acc);
  FASTATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    state.largest[0][half] = -infinity();
    state.sum[0][half] = 0.0f;
  }
  Place<false, true> at{row0 + lane / 4, 0, b, kv_head * p.group, p.group};
  for (int n0 = own; n0 < end; n0 += Config::kStep) {
    at.column = n0 + 2 * (lane & 3);
    copy_async_wait<1>();
    sync_warp();
    float s[1][kKeys / 8][4];
    multiply_rows<T, RowTile, KeyTile>(s, query_tile, 0, key_tile);
    sync_warp();
    copy_keys(n0 + Config::kStep);
    const bool masked = needs_masks(keys, n0, n0 + kKeys) || masked_by_element(p);
    finish_scores(s, p, interval, at, masked, sides_of(p, first, last, n0, n0 + kKeys));
    copy_async_wait<1>();
    sync_warp();
    uint32_t poisoned = 0;
    if (needs_care(p, masked)) poisoned = isolate_warp_values<Config>(value_tile, s);
    online_softmax(s, acc, state, p.multiplier, poisoned);
    uint32_t weights[1][kKeys / 16][4];
    pack_rows<T>(weights, s);
    accumulate<T, KeyTile>(acc, weights, value_tile);
    sync_warp();
    copy_values(n0 + Config::kStep);
  }
  copy_async_wait<0>();
  sync_block();  // the tiles may be written over

  // per warp: (rows, D) accumulators, then largest and sum of each row
  constexpr int kOwn = kRows * (kDim + 2) * 4;
  FASTATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    const float sum = quad_sum(state.sum[0][half]);
    FASTATTN_UNROLL
    for (int c = 0; c < kDim / 8; ++c)
      store_shared(merge + warp * kOwn + 4 * (row * kDim + 8 * c + 2 * (lane & 3)),
                   Vec2{{__builtin_bit_cast(uint32_t, acc[0][c][2 * half]),
                         __builtin_bit_cast(uint32_t, acc[0][c][2 * half + 1])}});
    if ((lane & 3) == 0) {
      store_shared(merge + warp * kOwn + 4 * (kRows * kDim + 2 * row), state.largest[0][half] * p.multiplier);
      store_shared(merge + warp * kOwn + 4 * (kRows * kDim + 2 * row + 1), sum);
    }
  }
  sync_block();
  const int row = thread_index() / 8;  // eight threads a row
  const int packed = row0 + row;
  if (packed >= packed_rows) return;
  const int i = packed / p.group, h = kv_head * p.group + packed % p.group;
  float largest = -infinity(), factor[kWarps], sum = 0.0f;
  FASTATTN_UNROLL
  for (int w = 0; w < kWarps; ++w)
    largest = fmaxf(largest, load_shared<float>(merge + w * kOwn + 4 * (kRows * kDim + 2 * row)));
  FASTATTN_UNROLL
  for (int w = 0; w < kWarps; ++w) {
    const float own_largest = load_shared<float>(merge + w * kOwn + 4 * (kRows * kDim + 2 * row));
    factor[w] = largest == -infinity() ? 0.0f : exp2_approx(own_largest - largest);
    sum += factor[w] * load_shared<float>(merge + w * kOwn + 4 * (kRows * kDim + 2 * row + 1));
  }
  const auto total = [&](int column) {
    float x = 0.0f;
    FASTATTN_UNROLL
    for (int w = 0; w < kWarps; ++w)
      if (factor[w] != 0.0f) x += factor[w] * load_shared<float>(merge + w * kOwn + 4 * (row * kDim + column));
    return x;
  };
  if (params.partial_out) {
    const i64 at_row = ((static_cast<i64>(split) * p.batch + b) * p.heads + h) * p.query_length + i;
    for (int column = thread_index() % 8; column < p.value_dim; column += 8)
      store_global(params.partial_out + at_row * p.value_dim + column, total(column));
    if (thread_index() % 8 == 0) {
      store_global(params.partial_stat + 2 * at_row, largest);
      store_global(params.partial_stat + 2 * at_row + 1, sum);
    }
    return;
  }
  const float sink = p.sink.data ? load_constant(p.sink.data + b * p.sink.batch + h) : -infinity();
  const RowEnd row_end = end_row(largest, sum, sink);
  uint16_t* out =
      static_cast<uint16_t*>(params.out.data) + b * params.out.batch + h * params.out.head + i * params.out.row;
  for (int column = 2 * (thread_index() % 8); column < p.value_dim; column += 16)
    store_global(reinterpret_cast<uint32_t*>(out + column),
                 pack2<T>(total(column) * row_end.factor, total(column + 1) * row_end.factor));
  if (thread_index() % 8 == 0)
    store_row_end(row_end, params.lse, params.statistics, (static_cast<i64>(b) * p.heads + h) * p.query_length + i);
}

}  // namespace fastattn::cuda
