// dK and dV above D = 128: two groups share 64 keys, since the accumulators of one result are half of a thread's
// registers.  The first computes scores, weights and dV, the second dP, dS and dK: two products each.
//
// Weights go from the first to the second through shared memory, as they come out of the accumulators: lane for lane,
// in float32, negative where dropout has them.  One group's exponentials run beside the other's products.
#pragma once

#include "backward_kv_block.h"

namespace fastattn::cuda {

// Barriers of both groups: weights have come, and their place may be written again.
inline constexpr int kWeightsGiven = 10, kWeightsTaken = 11;

inline constexpr uint32_t kMark = 0x80000000u;  // of a weight that dropout has: its sign, which is never set else

template <int N>
FASTATTN_DEVICE void mark_dropped(float (&s)[N], const Attention& p, const Place<true>& at) {
  in_parts(s, [&](auto& part, int first) {
    uint32_t bits[1];
    keep_bits<1, sizeof(part) / sizeof(part[0][0])>(bits, p, part_of(at, first));
    each(part, [&](float& x, int, int n, int r) { x = has(bits[0], n, r) ? x : float_of(bits_of(x) | kMark); });
  });
}

// kValues: this group has the weights and dV, else dS and dK.
template <class Config, bool kValues>
FASTATTN_DEVICE void compute_one_of_kv(const HopperBackwardParams& params, const HopperBackwardKvBlock<Config>& block) {
  using T = typename Config::T;
  using KeyTile = typename Config::KeyTile;
  using RowTile = typename Config::RowTile;
  constexpr int kQueries = Config::kQueries;
  const Attention& p = params.attention;
  const auto ring = block.ring();
  // A result leaves through the place of the tile that this group's products read.
  const RowStore<T, KeyTile, false> store{kValues ? params.dvalue : params.dkey,
                                          kValues ? params.rows_dvalue : params.rows_dkey,
                                          kValues ? block.keys() : block.values(),
                                          kValues ? 0 : 1,
                                          p.key_length,
                                          kValues ? p.value_dim : p.head_dim};
  const auto own_weights = [&] { return block.weights() + 16 * (thread_index_again() & (kGroupThreads - 1)); };
  const auto is_kept = [](float marked) { return Config::kPlain || !(bits_of(marked) & kMark); };
  const auto weight_of = [](float marked) { return Config::kPlain ? marked : float_of(bits_of(marked) & ~kMark); };
  int use = 0, round = 0;
  for_own_keys<Config>(params, [&](const KeyRows& keys) {
    if (keys.start >= keys.end) {
      if (store.rows_to.data) store.zeros(keys.n0, keys.b, keys.kv_head);
      return;
    }
    float acc[Config::kDim / 2];
    FASTATTN_UNROLL
    for (int i = 0; i < Config::kDim / 2; ++i) acc[i] = 0.0f;
    uint32_t packed[kQueries / 16][4];
    mbarrier_wait(block.keys_checked(), round & 1);
    bool first = true;
    for_rows_of<Config>(keys, p, [&](int h, int m0) {
      const bool masked = masked_rows<Config>(p, keys, m0), careful = needs_care(p, masked);
      float s[kQueries / 2];
      ring.wait(use, careful);
      warpgroup_fence();
      if constexpr (kValues) {
        issue_rows_product<T, KeyTile, RowTile>(s, block.keys(), ring.first(use));
      } else {
        issue_rows_product<T, KeyTile, RowTile>(s, block.values(), ring.second(use));
      }
      warpgroup_commit();
      // the accumulation of the tile before: its stage is free while this product runs
      warpgroup_wait<1>();
      settle(acc);
      if (!first) warp_arrive(ring.empty(use - 1));
      warpgroup_wait<0>();
      settle(s);
      const int thread = thread_index_again();
      const Place<true> at{keys.n0 + (thread >> 1 & 48) + (thread >> 2 & 7), m0 + 2 * (thread & 3), keys.b, h};
      RowNumbers<Config> numbers(block.statistics(use), thread);
      const float keep_scale = Config::kPlain || !p.dropout_seed ? 1.0f : p.keep_scale;
      if constexpr (kValues) {
        finish_rows<Config>(s, p, keys, at, m0, masked);
        weights_of(s, p.multiplier, careful, [&](int i) { return numbers.sums_of(i); });
        if constexpr (!Config::kPlain) {
          if (p.dropout_seed) mark_dropped(s, p, at);
        }
        if (!first) named_barrier_sync(kWeightsTaken, 2 * kGroupThreads);
        const SharedAddress to = own_weights();
        FASTATTN_UNROLL
        for (int i = 0; i < kQueries / 2; i += 4)
          store_shared(to + 4 * kGroupThreads * i,
                       Vec4{{bits_of(s[i]), bits_of(s[i + 1]), bits_of(s[i + 2]), bits_of(s[i + 3])}});
        named_barrier_arrive(kWeightsGiven, 2 * kGroupThreads);
        FASTATTN_UNROLL
        for (int i = 0; i < kQueries / 2; ++i)
          s[i] = seen_weight(weight_of(s[i]), careful ? numbers.delta_of(i) : 0.0f, is_kept(s[i]), keep_scale, careful);
      } else {
        named_barrier_sync(kWeightsGiven, 2 * kGroupThreads);
        const SharedAddress from = own_weights();
        FASTATTN_UNROLL
        for (int i = 0; i < kQueries / 2; i += 4) {
          const Vec4 weights = load_shared<Vec4>(from + 4 * kGroupThreads * i);
          FASTATTN_UNROLL
          for (int r = 0; r < 4; ++r) {
            const float weight = float_of(weights.x[r]);
            s[i + r] = score_gradient(weight_of(weight), s[i + r], numbers.delta_of(i + r), is_kept(weight), keep_scale,
                                      careful);
          }
        }
        if constexpr (!Config::kPlain) {
          if (p.softcap_out != 0.0f) {
            float raw[kQueries / 2];
            warpgroup_fence();
            issue_rows_product<T, KeyTile, RowTile>(raw, block.keys(), ring.first(use));
            warpgroup_commit();
            warpgroup_wait<0>();
            settle(raw);
            through_softcap(s, raw, p);
          }
        }
        // The other group may write its next weights, and after the last dV, over the keys.
        named_barrier_arrive(kWeightsTaken, 2 * kGroupThreads);
      }
      pack_weights<T>(packed, s);
      warpgroup_fence();
      issue_accumulate<T, RowTile>(acc, packed, kValues ? ring.second(use) : ring.first(use));
      warpgroup_commit();
      first = false;
      ++use;
    });
    warpgroup_wait<0>();
    settle(acc);
    warp_arrive(ring.empty(use - 1));
    if constexpr (kValues) named_barrier_sync(kWeightsTaken, 2 * kGroupThreads);
    const float factor[2] = {kValues ? 1.0f : p.scale, kValues ? 1.0f : p.scale};
    if (store.rows_to.data) store(keys.n0, keys.b, keys.kv_head, acc, factor);
    warp_arrive(block.keys_empty());
    ++round;
  });
}

}  // namespace fastattn::cuda
