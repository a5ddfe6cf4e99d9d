// Attention forward: a block per tile of 128 query rows of one head, online softmax over tiles of keys.
//
// Copies of the next tiles are in flight while a tile is computed: with one stage, V arrives during Q K^T and the next
// K during softmax and P V; with two, a whole tile ahead.  Either way a tile costs two barriers.
#pragma once

#include "dropout.h"
#include "row_end.h"
#include "tiles.h"

namespace fastattn::cuda {

template <class T_, int kDim_>
struct ForwardConfig {
  using T = T_;
  static constexpr ForwardTiles kTiles = forward_tiles(kDim_);
  static constexpr int kDim = kDim_, kRows = kTiles.rows, kKeys = kTiles.keys, kWarps = kTiles.warps;
  static constexpr int kThreads = kTiles.threads(), kBands = kTiles.bands();
  static constexpr int kFlagsAt = kTiles.flags_at(), kContextAt = kTiles.context_at(), kKeysAt = kTiles.keys_at();
  using RowTile = Tile<kRows, kDim>;
  using KeyTile = Tile<kKeys, kDim>;
  static_assert(kContextAt + kContextBytes <= kKeysAt);
};

// What a row has seen so far: largest score, sum of exponentials relative to it (of this lane's columns only).
template <int kBands>
struct RowState {
  float largest[kBands][2], sum[kBands][2];
};

// Folds a tile of finished scores into the state: on return s holds the weights relative to the new largest scores,
// and what was accumulated before is relative to them too.  `poisoned`: rows (bit 2 * band + half) that become NaN.
template <int kBands, int kColumns, int kAccumulators>
FASTATTN_DEVICE void online_softmax(float (&s)[kBands][kColumns][4], float (&acc)[kBands][kAccumulators][4],
                                    RowState<kBands>& state, float multiplier, uint32_t poisoned) {
  FASTATTN_UNROLL
  for (int band = 0; band < kBands; ++band) {
    FASTATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      float largest = s[band][0][2 * half];
      FASTATTN_UNROLL
      for (int n = 0; n < kColumns; ++n)
        largest = fmaxf(largest, fmaxf(s[band][n][2 * half], s[band][n][2 * half + 1]));
      largest = fmaxf(quad_max(largest), state.largest[band][half]);
      // a row that has seen nothing yet keeps a finite pivot, so that -inf - -inf never happens
      const float pivot = largest == -infinity() ? 0.0f : largest * multiplier;
      const float rescale = exp2_approx(state.largest[band][half] * multiplier - pivot);
      state.largest[band][half] = largest;
      float sum = 0.0f;
      FASTATTN_UNROLL
      for (int n = 0; n < kColumns; ++n) {
        FASTATTN_UNROLL
        for (int r = 2 * half; r < 2 * half + 2; ++r) {
          s[band][n][r] = exp2_approx(fmaf(s[band][n][r], multiplier, -pivot));
          sum += s[band][n][r];
        }
      }
      state.sum[band][half] = state.sum[band][half] * rescale + sum;
      const float factor = poisoned >> (2 * band + half) & 1 ? not_a_number() : rescale;
      FASTATTN_UNROLL
      for (int c = 0; c < kAccumulators; ++c) {
        acc[band][c][2 * half] *= factor;
        acc[band][c][2 * half + 1] *= factor;
      }
    }
  }
}

// A value row that is not finite: it makes NaN of the rows that see it and must be nothing to the others.  Zeroes such
// rows in the tile and returns which of this lane's rows see one (bit 2 * band + half).
template <class Config>
FASTATTN_DEVICE uint32_t isolate_values(SharedAddress value_tile, SharedAddress flags,
                                        const float (&s)[Config::kBands][Config::kKeys / 8][4]) {
  using T = typename Config::T;
  using KeyTile = typename Config::KeyTile;
  for (int j = thread_index(); j < Config::kKeys; j += Config::kThreads) store_shared<uint32_t>(flags + 4 * j, 0u);
  sync_block();
  for (int j = warp_index(); j < Config::kKeys; j += Config::kWarps) {
    bool bad = false;
    for (int c = lane_index(); c < KeyTile::kChunks; c += 32) {
      const Vec4 chunk = load_shared<Vec4>(value_tile + KeyTile::chunk(j, c));
      for (int n = 0; n < 4; ++n) bad = bad || finite_or_zero<T>(chunk.x[n]) != chunk.x[n];
    }
    if (any_lane(bad)) {
      for (int c = lane_index(); c < KeyTile::kChunks; c += 32)
        store_shared(value_tile + KeyTile::chunk(j, c), Vec4{{0, 0, 0, 0}});
      if (lane_index() == 0) store_shared<uint32_t>(flags + 4 * j, 1u);
    }
  }
  sync_block();
  uint32_t sees = 0;
  FASTATTN_UNROLL
  for (int band = 0; band < Config::kBands; ++band) {
    FASTATTN_UNROLL
    for (int n = 0; n < Config::kKeys / 8; ++n) {
      FASTATTN_UNROLL
      for (int r = 0; r < 4; ++r) {
        const uint32_t bad = load_shared<uint32_t>(flags + 4 * (8 * n + 2 * (lane_index() & 3) + (r & 1)));
        if (bad && s[band][n][r] != -infinity()) sees |= 1u << (2 * band + r / 2);
      }
    }
  }
  sees |= shuffle_xor(sees, 1);
  sees |= shuffle_xor(sees, 2);
  return sees;
}

template <class Config>
FASTATTN_DEVICE void attention_forward(const ForwardParams& params) {
  using T = typename Config::T;
  using RowTile = typename Config::RowTile;
  using KeyTile = typename Config::KeyTile;
  constexpr int kBands = Config::kBands, kKeys = Config::kKeys, kThreads = Config::kThreads;
  const Attention& p = params.attention;
  const int lane = lane_index();

  int tile = block_index() % params.tiles;
  // the longest rows of a causal mask start first
  if (p.window_right >= 0) tile = params.tiles - 1 - tile;
  const int b = block_index() / params.tiles / p.heads, h = block_index() / params.tiles % p.heads;
  const int m0 = tile * Config::kRows;
  const RowContext own = row_context(p, b, h, 1, m0, m0 + Config::kRows - 1);
  const int start = larger(own.keys.lo, 0) / kKeys, end = own.keys.hi > 0 ? (own.keys.hi + kKeys - 1) / kKeys : 0;

  const SharedAddress query_tile = shared_base();
  const int stages = params.two_stages ? 2 : 1;
  const SharedAddress flags = query_tile + Config::kFlagsAt, context_at = query_tile + Config::kContextAt;
  const SharedAddress key_tiles = query_tile + Config::kKeysAt;
  const SharedAddress value_tiles = key_tiles + stages * KeyTile::kBytes;
  if (thread_index() == 0) store_context(context_at, own);

  // Rows of the next tile, wherever that is: tiles are copied in order, keys and values each on their own.
  const auto rows_of = [&](const Operand& x, int head, int row) {
    return static_cast<const uint16_t*>(x.data) + b * x.batch + head * x.head + row * x.row;
  };
  const uint16_t* next_keys = rows_of(p.key, h / p.group, start * kKeys);
  const uint16_t* next_values = rows_of(p.value, h / p.group, start * kKeys);
  const auto copy_keys = [&](int n) {
    if (n < end)
      copy_tile<KeyTile, kThreads>(key_tiles + (n & (stages - 1)) * KeyTile::kBytes, next_keys, p.key.row,
                                   p.key_length - n * kKeys, p.head_dim);
    next_keys += kKeys * p.key.row;
    copy_async_commit();
  };
  const auto copy_values = [&](int n) {
    if (n < end)
      copy_tile<KeyTile, kThreads>(value_tiles + (n & (stages - 1)) * KeyTile::kBytes, next_values, p.value.row,
                                   p.key_length - n * kKeys, p.value_dim);
    next_values += kKeys * p.value.row;
    copy_async_commit();
  };

  RowState<kBands> state;
  float acc[kBands][Config::kDim / 8][4];
  clear(acc);
  FASTATTN_UNROLL
  for (int band = 0; band < kBands; ++band) {
    FASTATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      state.largest[band][half] = -infinity();
      state.sum[band][half] = 0.0f;
    }
  }

  if (start < end) {
    copy_tile<RowTile, kThreads>(query_tile, rows_of(p.query, h, m0), p.query.row, p.query_length - m0, p.head_dim);
    copy_keys(start);
    if (params.two_stages) copy_values(start);
  }
  const int band0 = warp_index() * 16 * kBands;  // first row of this warp
  const int row = m0 + band0 + lane / 4;
  for (int n = start; n < end; ++n) {
    const SharedAddress key_tile = key_tiles + (n & (stages - 1)) * KeyTile::kBytes;
    const SharedAddress value_tile = value_tiles + (n & (stages - 1)) * KeyTile::kBytes;
    const int n0 = n * kKeys;

    if (params.two_stages) {
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    sync_block();  // keys are there, and everyone is done with the tile before
    if (params.two_stages) {
      copy_keys(n + 1);
    } else {
      copy_values(n);
    }
    float s[kBands][kKeys / 8][4];
    multiply_rows<T, RowTile, KeyTile>(s, query_tile, band0, key_tile);
    const RowContext context = load_context(context_at);
    const Place<> at{row, n0 + 2 * (lane & 3), context.batch, context.head};
    const bool masked = needs_masks(context.keys, n0, n0 + kKeys);
    finish_scores(s, p, context.interval, at, masked, sides_of(p, context.first, context.last, n0, n0 + kKeys));

    if (params.two_stages) {
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    uint32_t poisoned = 0;
    if (needs_care(p, masked)) {
      if (sync_block_or(any_non_finite<T, KeyTile, kThreads>(value_tile)))
        poisoned = isolate_values<Config>(value_tile, flags, s);
    } else {
      sync_block();  // values are there, and everyone is done with the keys
    }
    if (params.two_stages) {
      copy_values(n + 1);
    } else {
      copy_keys(n + 1);
    }

    online_softmax(s, acc, state, p.multiplier, poisoned);
    if (p.dropout_seed) {
      uint32_t bits[kBands];
      keep_bits<kBands, kKeys / 8>(bits, p, at);
      each(s, [&](float& x, int band, int column, int r) { x = has(bits[band], column, r) ? x : 0.0f; });
    }
    uint32_t weights[kBands][kKeys / 16][4];
    pack_rows<T>(weights, s);
    accumulate<T, KeyTile>(acc, weights, value_tile);
  }
  copy_async_wait<0>();

  if (start >= end) sync_block();  // for the context
  const RowContext context = load_context(context_at);
  const i64 row0 = (static_cast<i64>(context.batch) * p.heads + context.head) * p.query_length;
  const float sink =
      p.sink.data ? load_constant(p.sink.data + context.batch * p.sink.batch + context.head) : -infinity();
  uint16_t* out =
      static_cast<uint16_t*>(params.out.data) + context.batch * params.out.batch + context.head * params.out.head;
  FASTATTN_UNROLL
  for (int band = 0; band < kBands; ++band) {
    FASTATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const RowEnd end_of_row =
          end_row(state.largest[band][half] * p.multiplier, quad_sum(state.sum[band][half]), sink);
      const int i = row + 16 * band + 8 * half;
      const bool valid = i < p.query_length;
      const float norm = end_of_row.factor * (p.dropout_seed ? p.keep_scale : 1.0f);
      store_row<T>(out + i * params.out.row, acc[band], half, norm, 0, p.value_dim, valid);
      if (valid && (lane & 3) == 0) store_row_end(end_of_row, params.lse, params.statistics, row0 + i);
    }
  }
}

}  // namespace fastattn::cuda
