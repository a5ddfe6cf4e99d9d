// dK and dV on sm_90a: two groups of 64 keys hold K and V while query rows come by, or above D = 128 share 64 keys.
//
// Tiles of scores are transposed, (keys, queries), as in attention/backward_kv.h: weights and dS come out of the
// accumulators as left operands.
#pragma once

#include "backward_kv_split.h"

namespace fastattn::cuda {

template <class Config>
FASTATTN_DEVICE void compute_backward_kv(const HopperBackwardParams& params, const HopperBackwardKvBlock<Config>& block,
                                         int group) {
  using T = typename Config::T;
  using KeyTile = typename Config::KeyTile;
  using RowTile = typename Config::RowTile;
  constexpr int kQueries = Config::kQueries, kAccumulators = Config::kDim / 2;
  const Attention& p = params.attention;
  const auto ring = block.ring();
  // results leave through the places of keys and values
  const RowStore<T, KeyTile, false> store_dkey{params.dkey, params.rows_dkey, block.keys(),
                                               group,       p.key_length,     p.head_dim};
  const RowStore<T, KeyTile, false> store_dvalue{params.dvalue, params.rows_dvalue, block.values(),
                                                 group,         p.key_length,       p.value_dim};
  const SharedAddress own_keys = block.keys() + 64 * group * KeyTile::kRowBytes;
  const SharedAddress own_values = block.values() + 64 * group * KeyTile::kRowBytes;
  int use = 0, round = 0;
  for_own_keys<Config>(params, [&](const KeyRows& keys) {
    if (keys.start >= keys.end) {
      if (params.rows_dkey.data) store_dkey.zeros(keys.n0, keys.b, keys.kv_head);
      if (params.rows_dvalue.data) store_dvalue.zeros(keys.n0, keys.b, keys.kv_head);
      return;
    }
    float dk[kAccumulators], dv[kAccumulators];
    FASTATTN_UNROLL
    for (int i = 0; i < kAccumulators; ++i) dk[i] = dv[i] = 0.0f;
    uint32_t weights[kQueries / 16][4], packed[kQueries / 16][4];
    mbarrier_wait(block.keys_checked(), round & 1);
    bool first = true;
    for_rows_of<Config>(keys, p, [&](int h, int m0) {
      const bool masked = masked_rows<Config>(p, keys, m0), careful = needs_care(p, masked);
      float s[kQueries / 2], ds[kQueries / 2];
      ring.wait(use, careful);
      warpgroup_fence();
      issue_rows_product<T, KeyTile, RowTile>(s, own_keys, ring.first(use));
      warpgroup_commit();
      warpgroup_fence();
      issue_rows_product<T, KeyTile, RowTile>(ds, own_values, ring.second(use));
      warpgroup_commit();
      warpgroup_wait<1>();
      settle(s);
      if (Config::kRunOn && !first) warp_arrive(ring.empty(use - 1));
      first = false;
      const int thread = thread_index_again();
      const Place<true> at{keys.n0 + 64 * group + (thread >> 1 & 48) + (thread >> 2 & 7), m0 + 2 * (thread & 3), keys.b,
                           h};
      finish_rows<Config>(s, p, keys, at, m0, masked);
      RowNumbers<Config> numbers(block.statistics(use), thread);
      finish_before(weights_of(s, p.multiplier, careful, [&](int i) { return numbers.sums_of(i); }));
      warpgroup_wait<0>();
      settle(ds);
      if constexpr (Config::kRunOn) {
        settle(dk);
        settle(dv);
      }
      gradient_of<Config>(s, ds, p, at, careful, [&](int i) { return RowStatistics{0.0f, 0.0f, numbers.delta_of(i)}; });
      pack_weights<T>(weights, s);
      if constexpr (!Config::kPlain) {
        if (p.softcap_out != 0.0f) {
          warpgroup_fence();
          issue_rows_product<T, KeyTile, RowTile>(s, own_keys, ring.first(use));
          warpgroup_commit();
          warpgroup_wait<0>();
          settle(s);
          through_softcap(ds, s, p);
        }
      }
      pack_weights<T>(packed, ds);
      warpgroup_fence();
      issue_accumulate<T, RowTile>(dv, weights, ring.second(use));
      issue_accumulate<T, RowTile>(dk, packed, ring.first(use));
      warpgroup_commit();
      if constexpr (!Config::kRunOn) {
        warpgroup_wait<0>();
        settle(dk);
        settle(dv);
        warp_arrive(ring.empty(use));
      }
      ++use;
    });
    if constexpr (Config::kRunOn) {
      warpgroup_wait<0>();
      settle(dk);
      settle(dv);
      warp_arrive(ring.empty(use - 1));
    }
    const float scale[2] = {p.scale, p.scale}, one[2] = {1.0f, 1.0f};
    if (params.rows_dkey.data) store_dkey(keys.n0, keys.b, keys.kv_head, dk, scale);
    if (params.rows_dvalue.data) store_dvalue(keys.n0, keys.b, keys.kv_head, dv, one);
    warp_arrive(block.keys_empty());
    ++round;
  });
}

template <class Config>
FASTATTN_DEVICE void hopper_attention_backward_kv(const HopperBackwardParams& params) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const HopperBackwardKvBlock<Config> block;
  if (thread_index() == 0) {
    mbarrier_init(block.keys_full(), 2);
    mbarrier_init(block.keys_empty(), 4 * Config::kGroups);
    mbarrier_init(block.keys_checked(), kCheckers);
    block.ring().init(4 * Config::kGroups);
    mbarrier_init_fence();
  }
  sync_block();
  const int warp = warp_index();
  if (warp < 4) {
    registers_decrease<HopperBackwardKvTiles::kProducerRegisters>();
    if (warp == 0) {
      if (elect_one()) load_backward_kv<Config>(params, block);
    } else {
      check_backward_kv<Config>(params, block, warp_index() - 1);
    }
  } else {
    registers_increase<HopperBackwardKvTiles::kRegisters>();
    const int group = warp_index() / 4 - 1;
    if constexpr (Config::kSplit) {
      if (group == 0) {
        compute_one_of_kv<Config, true>(params, block);
      } else {
        compute_one_of_kv<Config, false>(params, block);
      }
    } else {
      compute_backward_kv<Config>(params, block, group);
    }
  }
#endif
}

}  // namespace fastattn::cuda
