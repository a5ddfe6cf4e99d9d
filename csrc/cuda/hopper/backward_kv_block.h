// What the warpgroups of dK and dV share: a tile of keys stays, and the query rows of every query head that shares them
// come by with the gradients of the output.  The checkers bring each row's statistics as well, which have no alignment
// that a copy would need.
#pragma once

#include "gradient.h"
#include "ring.h"
#include "row_store.h"

namespace fastattn::cuda {

template <class T_, int kDim_, bool kPlain_>
struct HopperBackwardKvConfig {
  using T = T_;
  static constexpr HopperBackwardKvTiles kTiles = hopper_backward_kv_tiles(kDim_, kPlain_);
  static constexpr bool kPlain = kPlain_;
  static constexpr int kDim = kDim_, kQueries = kTiles.queries, kStages = kTiles.stages;
  static constexpr int kKeys = kTiles.keys(), kGroups = HopperBackwardKvTiles::kGroups;
  static constexpr int kValuesAt = kTiles.values_at(), kRingAt = kTiles.ring_at();
  static constexpr int kWeightsAt = kTiles.weights_at(), kStatisticsAt = kTiles.statistics_at();
  static constexpr int kBarriersAt = kTiles.barriers_at();
  static constexpr bool kSplit = kTiles.split();
  // whether rows that see all keys by ids and masks are known to: two registers, which are not there above D = 128
  static constexpr bool kKnowsFull = !kSplit;
  // whether the last products of a tile may run into the next tile's: their left operands take registers until then
  static constexpr bool kRunOn = kTiles.held_registers() <= 192;
  using KeyTile = Tile<kKeys, kDim>;
  using RowTile = Tile<kQueries, kDim>;
};

template <class Config>
struct HopperBackwardKvBlock {
  SharedAddress base = shared_base();
  FASTATTN_DEVICE SharedAddress keys() const { return base; }
  FASTATTN_DEVICE SharedAddress values() const { return base + Config::kValuesAt; }
  FASTATTN_DEVICE SharedAddress keys_full() const { return base + Config::kBarriersAt; }
  FASTATTN_DEVICE SharedAddress keys_empty() const { return base + Config::kBarriersAt + 8; }
  FASTATTN_DEVICE SharedAddress keys_checked() const { return base + Config::kBarriersAt + 16; }
  FASTATTN_DEVICE Ring<typename Config::RowTile, Config::kStages> ring() const {
    return {base + Config::kRingAt, base + Config::kBarriersAt + 24};
  }
  FASTATTN_DEVICE SharedAddress weights() const { return base + Config::kWeightsAt; }
  // (largest, log of the sum) of each row, then delta of each
  FASTATTN_DEVICE SharedAddress statistics(int use) const {
    return base + Config::kStatisticsAt + static_cast<uint32_t>(use) % Config::kStages * (12 * Config::kQueries);
  }
};

// A tile of keys and the tiles of query rows that see it.
struct KeyRows {
  Interval interval;
  Range all;  // rows that all keys have in common are [full_lo, full_hi)
  int b, kv_head, n0;
  int last;        // key of the tile that exists
  int start, end;  // tiles of rows of one head

  FASTATTN_DEVICE int steps(const Attention& p) const { return (end - start) * p.group; }
};

template <class Config>
FASTATTN_DEVICE KeyRows key_rows(const Schedule& order, const Attention& p, int t) {
  const int kv_heads = p.heads / p.group;
  int tile, pair;
  place_of(order, t, tile, pair);
  KeyRows keys;
  keys.b = pair / kv_heads;
  keys.kv_head = pair % kv_heads;
  keys.n0 = tile * Config::kKeys;
  keys.interval = interval_of(p, keys.b);
  keys.last = smaller(keys.n0 + Config::kKeys, p.key_length) - 1;
  keys.all = queries_of_keys(p, keys.interval, keys.n0, keys.n0 + Config::kKeys - 1);
  Range some = queries_of_keys(p, keys.interval, keys.n0, keys.last);
  if constexpr (!Config::kPlain) {
    Range seen = keys.all;
    narrow(seen, p, p.query_spans, keys.b, keys.kv_head * p.group, p.group, keys.n0, keys.last);
    some.lo = larger(some.lo, seen.lo);
    some.hi = smaller(some.hi, seen.hi);
    if constexpr (Config::kKnowsFull) keys.all = seen;
  }
  keys.start = larger(some.lo, 0) / Config::kQueries;
  keys.end = larger(some.hi > 0 ? (some.hi + Config::kQueries - 1) / Config::kQueries : 0, keys.start);
  return keys;
}

template <class Config, class F>
FASTATTN_DEVICE void for_own_keys(const HopperBackwardParams& params, F f) {
  for_own_tiles(params.schedule, [&](int t) { f(key_rows<Config>(params.schedule, params.attention, t)); });
}

template <class Config>
FASTATTN_DEVICE bool masked_rows(const Attention& p, const KeyRows& keys, int m0) {
  const bool cut = m0 < keys.all.full_lo || m0 + Config::kQueries > keys.all.full_hi;
  return cut || (!Config::kPlain && !Config::kKnowsFull && masked_by_element(p));
}

// Calls f(head, first row) for every tile of rows of one head, then of the next.
template <class Config, class F>
FASTATTN_DEVICE void for_rows_of(const KeyRows& keys, const Attention& p, F f) {
  FASTATTN_NO_UNROLL
  for (int h = keys.kv_head * p.group; h < (keys.kv_head + 1) * p.group; ++h) {
    FASTATTN_NO_UNROLL
    for (int m = keys.start; m < keys.end; ++m) f(h, m * Config::kQueries);
  }
}

// From raw products to scores, of keys from the one of `at` on and the rows from m0 on.
template <class Config, int N>
FASTATTN_DEVICE void finish_rows(float (&s)[N], const Attention& p, const KeyRows& keys, const Place<true>& at, int m0,
                                 bool masked) {
  const int first = m0 + keys.interval.offset;
  const int last = smaller(m0 + Config::kQueries, p.query_length) - 1 + keys.interval.offset;
  finish_tile<Config>(s, p, keys.interval, at, side_of(p, first, last, keys.n0, keys.last + 1), masked);
}

// Statistics of the rows of a lane's accumulators: two neighbouring rows share four, which are asked for in order.
template <class Config>
struct RowNumbers {
  SharedAddress pairs, deltas;
  Vec4 sums{};
  Vec2 delta{};

  FASTATTN_DEVICE RowNumbers(SharedAddress statistics, int thread)
      : pairs(statistics + 16 * (thread & 3)), deltas(statistics + 8 * Config::kQueries + 8 * (thread & 3)) {}

  // of the softmax, without delta
  FASTATTN_DEVICE RowStatistics sums_of(int i) {
    if (i % 4 == 0) sums = load_shared<Vec4>(pairs + 16 * i);
    return {float_of(sums.x[2 * (i & 1)]), float_of(sums.x[2 * (i & 1) + 1]), 0.0f};
  }
  FASTATTN_DEVICE float delta_of(int i) {
    if (i % 4 == 0) delta = load_shared<Vec2>(deltas + 8 * i);
    return float_of(delta.x[i & 1]);
  }
};

template <class Config>
FASTATTN_DEVICE void load_backward_kv(const HopperBackwardParams& params, const HopperBackwardKvBlock<Config>& block) {
  using KeyTile = typename Config::KeyTile;
  using RowTile = typename Config::RowTile;
  const auto ring = block.ring();
  int use = 0, round = 0;
  for_own_keys<Config>(params, [&](const KeyRows& keys) {
    if (keys.start >= keys.end) return;
    mbarrier_wait(block.keys_empty(), (round & 1) ^ 1);
    load_tile<KeyTile>(block.keys(), params.key, block.keys_full(), keys.n0, keys.kv_head, keys.b,
                       CachePolicy::kEvictFirst);
    load_tile<KeyTile>(block.values(), params.value, block.keys_full(), keys.n0, keys.kv_head, keys.b,
                       CachePolicy::kEvictFirst);
    ++round;
    for_rows_of<Config>(keys, params.attention, [&](int h, int m0) {
      ring.wait_empty(use);
      load_tile<RowTile>(ring.first(use), params.query, ring.full(use), m0, h, keys.b, CachePolicy::kEvictLast);
      load_tile<RowTile>(ring.second(use), params.grad_out, ring.full(use), m0, h, keys.b, CachePolicy::kEvictLast);
      ++use;
    });
  });
}

template <class Config>
FASTATTN_DEVICE void check_backward_kv(const HopperBackwardParams& params, const HopperBackwardKvBlock<Config>& block,
                                       int checker) {
  using T = typename Config::T;
  const Attention& p = params.attention;
  const auto ring = block.ring();
  int use = 0, round = 0;
  for_own_keys<Config>(params, [&](const KeyRows& keys) {
    if (keys.start >= keys.end) return;
    // rows that saw a bad key have a NaN lse or delta already; the others must not meet it again
    mbarrier_wait(block.keys_full(), round & 1);
    clean<T, 2 * Config::KeyTile::kBytes>(block.keys(), checker);
    warp_arrive(block.keys_checked());
    ++round;
    for_rows_of<Config>(keys, p, [&](int h, int m0) {
      ring.wait_empty(use);
      const SharedAddress to = block.statistics(use);
      const i64 row0 = (static_cast<i64>(keys.b) * p.heads + h) * p.query_length;
      FASTATTN_NO_UNROLL
      for (int i = 32 * checker + lane_index(); i < Config::kQueries; i += 32 * kCheckers) {
        const bool inside = m0 + i < p.query_length;
        const i64 row = row0 + m0 + i;
        store_shared(to + 8 * i,
                     inside ? load_constant(reinterpret_cast<const Vec2*>(params.statistics) + row) : Vec2{{0, 0}});
        store_shared(to + 8 * Config::kQueries + 4 * i, inside ? load_constant(params.delta + row) : 0.0f);
      }
      if (needs_care(p, masked_rows<Config>(p, keys, m0))) {
        mbarrier_wait(ring.full(use), ring.phase(use));
        clean<T, 2 * Config::RowTile::kBytes>(ring.first(use), checker);
      }
      warp_arrive(ring.checked(use));
      ++use;
    });
  });
}

}  // namespace fastattn::cuda
