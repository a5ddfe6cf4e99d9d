// dQ on sm_90a: as the forward, a block that stays and a warpgroup that brings tiles.  Two groups of 64 query rows hold
// Q and dO; keys and values come by in a ring.  They also own what is a sum over a query's keys: the slopes' gradient
// and those of the two ends of the distance table.
//
// Three products for each tile of keys.  dP runs while the weights are computed from S, and the accumulation of one
// tile's dS while the next tile's S is waited for.
#pragma once

#include "gradient.h"
#include "ring.h"
#include "row_store.h"

namespace fastattn::cuda {

template <class T_, int kDim_, bool kPlain_>
struct HopperBackwardQConfig {
  using T = T_;
  static constexpr HopperBackwardQTiles kTiles = hopper_backward_q_tiles(kDim_, kPlain_);
  static constexpr bool kPlain = kPlain_;
  static constexpr int kDim = kDim_, kKeys = kTiles.keys, kStages = kTiles.stages;
  static constexpr int kRows = HopperBackwardQTiles::kRows, kGroups = HopperBackwardQTiles::kGroups;
  static constexpr int kGradsAt = kTiles.grads_at(), kRingAt = kTiles.ring_at(), kContextsAt = kTiles.contexts_at();
  static constexpr int kSumsAt = kTiles.sums_at(), kBarriersAt = kTiles.barriers_at();
  // whether dP is issued when the scores are finished: before, its accumulators take registers that biases need
  static constexpr bool kLate = !kPlain && kDim > 128;
  using QueryTile = Tile<kRows, kDim>;
  using KeyTile = Tile<kKeys, kDim>;
};

template <class Config>
struct HopperBackwardQBlock {
  SharedAddress base = shared_base();
  FASTATTN_DEVICE SharedAddress queries() const { return base; }
  FASTATTN_DEVICE SharedAddress grads() const { return base + Config::kGradsAt; }
  FASTATTN_DEVICE SharedAddress context(int warp) const { return base + Config::kContextsAt + kContextBytes * warp; }
  FASTATTN_DEVICE SharedAddress sums() const { return base + Config::kSumsAt; }
  FASTATTN_DEVICE SharedAddress rows_full() const { return base + Config::kBarriersAt; }
  FASTATTN_DEVICE SharedAddress rows_empty() const { return base + Config::kBarriersAt + 8; }
  FASTATTN_DEVICE Ring<typename Config::KeyTile, Config::kStages> ring() const {
    return {base + Config::kRingAt, base + Config::kBarriersAt + 16};
  }
};

template <class Config>
FASTATTN_DEVICE void load_backward_q(const HopperBackwardParams& params, const HopperBackwardQBlock<Config>& block) {
  using KeyTile = typename Config::KeyTile;
  using QueryTile = typename Config::QueryTile;
  const auto ring = block.ring();
  int use = 0, round = 0;
  for_own_rows<Config>(params.schedule, params.attention, [&](const QueryRows& rows) {
    if (rows.start >= rows.end) return;
    const int b = rows.context.batch, h = rows.context.head, kv = h / params.attention.group;
    mbarrier_wait(block.rows_empty(), (round & 1) ^ 1);
    load_tile<QueryTile>(block.queries(), params.query, block.rows_full(), rows.m0, h, b, CachePolicy::kEvictFirst);
    load_tile<QueryTile>(block.grads(), params.grad_out, block.rows_full(), rows.m0, h, b, CachePolicy::kEvictFirst);
    ++round;
    for (int n = rows.start; n < rows.end; ++n, ++use) {
      ring.wait_empty(use);
      load_tile<KeyTile>(ring.first(use), params.key, ring.full(use), n * Config::kKeys, kv, b,
                         CachePolicy::kEvictLast);
      load_tile<KeyTile>(ring.second(use), params.value, ring.full(use), n * Config::kKeys, kv, b,
                         CachePolicy::kEvictLast);
    }
  });
}

// Rows that saw a bad key have a NaN lse or delta already; the others must not meet it again.
template <class Config>
FASTATTN_DEVICE void check_backward_q(const HopperBackwardParams& params, const HopperBackwardQBlock<Config>& block,
                                      int checker) {
  const auto ring = block.ring();
  int use = 0;
  for_own_rows<Config>(params.schedule, params.attention, [&](const QueryRows& rows) {
    for (int n = rows.start; n < rows.end; ++n, ++use) {
      ring.wait_empty(use);
      if (checked_at<Config>(params.attention, rows.context, n)) {
        mbarrier_wait(ring.full(use), ring.phase(use));
        clean<typename Config::T, 2 * Config::KeyTile::kBytes>(ring.first(use), checker);
      }
      warp_arrive(ring.checked(use));
    }
  });
}

// Sum over the lanes of a group, in its first thread.  `scratch`: a number for each of its warps.
FASTATTN_DEVICE float group_sum(float x, SharedAddress scratch, int group) {
  for (int step = 16; step; step /= 2) x += shuffle_xor(x, step);
  named_barrier_sync(kGroupBarrier + group, kGroupThreads);
  if (lane_index() == 0) store_shared(scratch + 4 * (warp_index() & 3), x);
  named_barrier_sync(kGroupBarrier + group, kGroupThreads);
  float total = 0.0f;
  if (thread_index() % kGroupThreads == 0)
    for (int w = 0; w < 4; ++w) total += load_shared<float>(scratch + 4 * w);
  return total;
}

template <class Config>
FASTATTN_DEVICE void compute_backward_q(const HopperBackwardParams& params, const HopperBackwardQBlock<Config>& block,
                                        int group) {
  using T = typename Config::T;
  using QueryTile = typename Config::QueryTile;
  using KeyTile = typename Config::KeyTile;
  constexpr int kKeys = Config::kKeys;
  const Attention& p = params.attention;
  const auto ring = block.ring();
  // dQ leaves through the queries' place
  const RowStore<T, QueryTile, false> store{params.dquery, params.rows_dquery, block.queries(),
                                            group,         p.query_length,     p.head_dim};
  const auto own_row = [&] { return (thread_index_again() >> 7) * 64 - 64; };  // of a tile, the group's first
  const auto own_queries = [&] { return block.queries() + own_row() * QueryTile::kRowBytes; };
  const auto own_grads = [&] { return block.grads() + own_row() * QueryTile::kRowBytes; };
  int use = 0, round = 0;
  for_own_rows<Config>(params.schedule, p, [&](const QueryRows& rows) {
    // as in the forward: found again where they are needed
    const auto context_at = [&] { return block.context((thread_index_again() >> 5) - 4); };
    const auto context = [&] {
      if constexpr (Config::kPlain) return rows.context;
      return load_context(context_at());
    };
    const auto m0 = [&] {
      if constexpr (Config::kPlain) return rows.m0;
      const RowContext here = context();
      return here.first - here.interval.offset;
    };
    const auto row = [&] {
      const int thread = thread_index_again();
      return m0() + own_row() + (thread >> 1 & 48) + (thread >> 2 & 7);
    };
    if constexpr (!Config::kPlain) {
      sync_warp();
      if (lane_index() == 0) store_context(context_at(), rows.context);
      sync_warp();
    }
    float acc[Config::kDim / 2];
    FASTATTN_UNROLL
    for (int i = 0; i < Config::kDim / 2; ++i) acc[i] = 0.0f;
    float slope_sum = 0.0f, left_sum = 0.0f, right_sum = 0.0f;

    if (rows.start < rows.end) {
      RowStatistics own[2];
      FASTATTN_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int i = row() + 8 * half;
        const RowContext here = context();
        const i64 at = (static_cast<i64>(here.batch) * p.heads + here.head) * p.query_length + i;
        const bool inside = i < p.query_length;
        own[half].largest = inside ? load_constant(params.statistics + 2 * at) : 0.0f;
        own[half].log_sum = inside ? load_constant(params.statistics + 2 * at + 1) : infinity();
        own[half].delta = inside ? load_constant(params.delta + at) : 0.0f;
      }
      const auto row_of = [&](int i) { return own[i >> 1 & 1]; };
      uint32_t packed[kKeys / 16][4];
      mbarrier_wait(block.rows_full(), round & 1);
      FASTATTN_NO_UNROLL
      for (int n = rows.start; n < rows.end; ++n, ++use) {
        const bool masked = masks_at<Config>(context(), n), careful = checked_at<Config>(p, context(), n);
        float s[kKeys / 2], ds[kKeys / 2];
        ring.wait(use, careful);
        warpgroup_fence();
        issue_rows_product<T, QueryTile, KeyTile>(s, own_queries(), ring.first(use));
        warpgroup_commit();
        const auto issue_gradients = [&] {
          warpgroup_fence();
          issue_rows_product<T, QueryTile, KeyTile>(ds, own_grads(), ring.second(use));
          warpgroup_commit();
        };
        if constexpr (!Config::kLate) issue_gradients();
        warpgroup_wait<Config::kLate ? 0 : 1>();
        settle(s);
        if (n > rows.start) warp_arrive(ring.empty(use - 1));  // its dS went in before this tile's scores
        finish_keys<Config>(s, p, context(), row(), n * kKeys, masked);
        if constexpr (Config::kLate) issue_gradients();
        finish_before(weights_of(s, p.multiplier, careful, row_of));
        warpgroup_wait<0>();
        settle(ds);
        settle(acc);
        const RowContext here = context();
        const Place<> at{row(), n * kKeys + 2 * (lane_index() & 3), here.batch, here.head};
        gradient_of<Config>(s, ds, p, at, careful, row_of);
        if constexpr (!Config::kPlain) {
          if (params.partial_slopes) {
            FASTATTN_UNROLL
            for (int i = 0; i < kKeys / 2; ++i) {
              const int distance = at.key(0, i / 4, i & 3) - (at.query(0, i / 4, i & 3) + here.interval.offset);
              slope_sum -= ds[i] * static_cast<float>(distance < 0 ? -distance : distance);
            }
          }
          if (params.partial_ends) {
            const Side side = side_of(p, here.first, here.last, n * kKeys, (n + 1) * kKeys);
            FASTATTN_UNROLL
            for (int i = 0; i < kKeys / 2; ++i) {
              const int distance = at.key(0, i / 4, i & 3) - (at.query(0, i / 4, i & 3) + here.interval.offset);
              if (side == Side::kFarLeft || (side == Side::kNear && distance <= -p.table_left)) {
                left_sum += ds[i];
              } else if (side == Side::kFarRight || distance >= p.table_right) {
                right_sum += ds[i];
              }
            }
          }
          if (p.softcap_out != 0.0f) {
            warpgroup_fence();
            issue_rows_product<T, QueryTile, KeyTile>(s, own_queries(), ring.first(use));
            warpgroup_commit();
            warpgroup_wait<0>();
            settle(s);
            through_softcap(ds, s, p);
          }
        }
        pack_weights<T>(packed, ds);
        warpgroup_fence();
        issue_accumulate<T, KeyTile>(acc, packed, ring.first(use));
        warpgroup_commit();
      }
      warpgroup_wait<0>();
      settle(acc);
      warp_arrive(ring.empty(use - 1));
      const float factor[2] = {p.scale, p.scale};
      if (params.rows_dquery.data) store(m0(), context().batch, context().head, acc, factor);
      warp_arrive(block.rows_empty());
      ++round;
    } else if (params.rows_dquery.data) {
      store.zeros(rows.m0, rows.context.batch, rows.context.head);
    }
    if constexpr (!Config::kPlain) {
      const RowContext here = context();
      const i64 tile = (static_cast<i64>(here.batch) * p.heads + here.head) * params.schedule.tiles;
      const i64 place = (tile + m0() / Config::kRows) * Config::kGroups + group;
      const SharedAddress scratch = block.sums() + 16 * group;
      const bool first = thread_index() % kGroupThreads == 0;
      if (params.partial_slopes) {
        const float total = group_sum(slope_sum, scratch, group);
        if (first) store_global(params.partial_slopes + place, total);
      }
      if (params.partial_ends) {
        const float left = group_sum(left_sum, scratch, group);
        const float right = group_sum(right_sum, scratch, group);
        if (first) {
          store_global(params.partial_ends + 2 * place, left);
          store_global(params.partial_ends + 2 * place + 1, right);
        }
      }
    }
  });
}

template <class Config>
FASTATTN_DEVICE void hopper_attention_backward_q(const HopperBackwardParams& params) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const HopperBackwardQBlock<Config> block;
  if (thread_index() == 0) {
    mbarrier_init(block.rows_full(), 2);
    mbarrier_init(block.rows_empty(), 4 * Config::kGroups);
    block.ring().init(4 * Config::kGroups);
    mbarrier_init_fence();
  }
  sync_block();
  const int warp = warp_index();
  if (warp < 4) {
    registers_decrease<HopperBackwardQTiles::kProducerRegisters>();
    if (warp == 0) {
      if (elect_one()) load_backward_q<Config>(params, block);
    } else {
      check_backward_q<Config>(params, block, warp_index() - 1);
    }
  } else {
    registers_increase<HopperBackwardQTiles::kRegisters>();
    compute_backward_q<Config>(params, block, warp_index() / 4 - 1);
  }
#endif
}

}  // namespace fastattn::cuda
