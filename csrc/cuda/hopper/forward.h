// Attention forward on sm_90a: a block per multiprocessor that stays, a warpgroup that brings tiles, two or three that
// compute.
//
// A warpgroup of consumers keeps two products in flight: S of tile n, and the accumulation of tile n + 1's weights. The
// softmax of tile n runs while the latter does, and, where groups alternate, while another group has the tensor cores.
#pragma once

#include "producer.h"
#include "softmax.h"

namespace fastattn::cuda {

// Barriers of some of the block's threads: a turn at the tensor cores for each group.
inline constexpr int kTurnBarrier = 1;

// A bool that the compiler knows, where a function takes either.
template <bool kValue>
struct Known {
  FASTATTN_DEVICE operator bool() const { return kValue; }
};

// Rows of a group that no box fills.  What they hold reaches no row but their own; it must be something.
template <class QueryTile>
FASTATTN_DEVICE void zero_spare_rows(SharedAddress own_queries, int group, const Packing& packing) {
  constexpr int kRowBytes = QueryTile::kRowBytes, kPanels = QueryTile::kDim / QueryTile::kPanelColumns;
  const int from = packing.heads * packing.queries * kRowBytes;
  FASTATTN_NO_UNROLL
  for (int panel = 0; panel < kPanels; ++panel) {
    FASTATTN_NO_UNROLL
    for (int at = from + 16 * (thread_index() % kGroupThreads); at < 64 * kRowBytes; at += 16 * kGroupThreads)
      store_shared(own_queries + panel * QueryTile::kPanelBytes + at, Vec4{{0, 0, 0, 0}});
  }
  fence_async_shared();
  named_barrier_sync(kGroupBarrier + group, kGroupThreads);
}

// warp_arrive without a register for the number of the lane.
FASTATTN_DEVICE void elected_arrive(SharedAddress barrier) {
  sync_warp();
  if (elect_one()) mbarrier_arrive(barrier);
}

FASTATTN_DEVICE float scale_at(const PerHead& scale, int b, int head) {
  return scale.data ? load_constant(scale.data + b * scale.batch + head) : 1.0f;
}

// Of 8 bits: from products of numbers as they are stored to base-2 logarithms.  Scales that are negative make NaN.
FASTATTN_DEVICE void scale_multipliers(float (&multiplier)[2], const HopperForwardParams& params,
                                       const PackedPlace& at) {
  FASTATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int h = at.head_at(0, 2 * half);
    const float scale =
        scale_at(params.query_scale, at.batch, h) * scale_at(params.key_scale, at.batch, h / params.attention.group);
    // zero would make NaN of -inf, as scores of zero come near enough
    multiplier[half] = scale >= 0.0f ? fmaxf(multiplier[half] * scale, 1e-30f) : not_a_number();
  }
}

template <class Config>
FASTATTN_DEVICE void consume_tiles(const HopperForwardParams& params, const HopperBlock<Config>& block, int group) {
  using T = typename Config::T;
  using Block = HopperBlock<Config>;
  using QueryTile = typename Config::QueryTile;
  using KeyTile = typename Config::KeyTile;
  using ValueTile = typename Config::ValueTile;
  constexpr int kKeys = Config::kKeys, kGroups = Config::kGroups;
  constexpr bool kAlternate = Config::kAlternate, kOwnOut = Config::kOwnOut;
  const Attention& p = params.attention;
  const Packing& packing = params.packing;
  const RowStore<typename Config::Out, typename Config::OutTile, kOwnOut, /*kPacked=*/true> store{
      params.out, params.rows_out, block.out(), group, p.query_length, p.value_dim, packing};
  const SharedAddress own_queries = block.queries() + 64 * group * QueryTile::kRowBytes;
  if (packing.heads * packing.queries < 64) zero_spare_rows<QueryTile>(own_queries, group, packing);
  int use = 0, round = 0;  // of the ring: the tile whose weights are at hand; tiles of queries so far
  if (kAlternate && group == 0) named_barrier_arrive(kTurnBarrier, 2 * kGroupThreads);

  for_own_rows<Config>(params.schedule, params.attention, packing, [&](const QueryRows& rows) {
    // Needed for a moment in each tile, and too much to keep where a tile has every stage: what the tile of rows knows
    // of itself, and the rows of this lane.
    const auto context_at = [&] { return block.context((thread_index_again() >> 5) - 4); };
    const auto context = [&] {
      if constexpr (Config::kPlain) return rows.context;
      return load_context(context_at());
    };
    const auto place = [&](const RowContext& context) { return packed_place(p, packing, context, group); };
    OwnRows own{{-infinity(), -infinity()}, {0.0f, 0.0f}, {1.0f, 1.0f}};
    float multiplier[2] = {p.multiplier, p.multiplier};
    if constexpr (Config::kEight) scale_multipliers(multiplier, params, place(rows.context));
    const auto finish = [&](float (&s)[Config::kKeys / 2], int n, auto masked) {
      const RowContext here = context();
      const PackedPlace at = place(here);
      const int n0 = n * kKeys;
      const bool before = n0 + kKeys - 1 <= here.first;
      const bool lines = Config::kBiases && p.slopes.data && (before || n0 >= here.last);
      finish_keys<Config>(s, p, here, at, n0, masked, !lines);
      float shift[2] = {0.0f, 0.0f};
      if constexpr (Config::kBiases) {
        if (lines) add_lines(s, shift, block.slopes(context_at()), here.interval, part_of(at, n0), before);
      }
      weigh<Config::kBiases, Config::kWeightExponent>(s, own, multiplier, shift);
      if constexpr (Config::kBiases) {
        if (p.dropout_seed) drop(s, p, place(context()), n * kKeys);
      }
    };
    if constexpr (!Config::kPlain) {
      sync_warp();  // after the reads of the tile before
      if (lane_index() == 0) store_context(context_at(), rows.context);
      if (Config::kBiases && p.slopes.data && lane_index() < 16) {
        const int row = (thread_index_again() >> 1 & 48) + lane_index();
        const int head = rows.context.head + row - (row * packing.reciprocal >> 16) * packing.heads;
        store_shared(block.slopes(context_at()) + 4 * lane_index(), slope_of(p, rows.context.batch, head));
      }
      sync_warp();
    }
    float acc[Config::kDim / 2];
    FASTATTN_UNROLL
    for (int i = 0; i < Config::kDim / 2; ++i) acc[i] = 0.0f;

    if (rows.start < rows.end) {
      uint32_t weights[Config::kWeights][4];
      const auto pack = [&](const float (&s)[kKeys / 2]) {
        if constexpr (Config::kEight) {
          pack_weights_of_8_bits(weights, s);
        } else {
          pack_weights<T>(weights, s);
        }
      };
      // Into `part` where sums are added apart: accumulators lag a tile behind then, and so does what rescales them.
      const auto accumulate = [&](auto& part) {
        if constexpr (Config::kAddsApart) {
          issue_accumulate_rows<T, ValueTile>(part, weights, block.values(use), false);
        } else if constexpr (Config::kEight) {
          issue_accumulate_rows<T, ValueTile>(acc, weights, block.values(use), true);
        } else {
          issue_accumulate<T, ValueTile>(acc, weights, block.values(use));
        }
      };
      // Checkers arrive for every tile, early where they do not look: their phase is waited for too, or they could fall
      // behind by the length of the ring, where its parity is the same again.
      const auto wait_values = [&](bool checked) {
        if (!Config::kEight && !checked) mbarrier_wait(block.values_full(use), Block::phase(use));
        mbarrier_wait(block.values_checked(use), Block::phase(use));
      };
      // after the product with the values of tile n
      const auto release_values = [&](int n, bool checked) {
        if (checked) {
          const Vec4 found = load_shared<Vec4>(block.checks(use));
          if (found.x[0] | found.x[1] | found.x[2])
            poison(acc, rows_that_see<Config>(block.checks(use), p, context().interval, place(context()), n * kKeys));
        }
        elected_arrive(block.values_empty(use));
      };

      mbarrier_wait(block.queries_full(), round & 1);
      int n = rows.end - 1;
      {
        float s[kKeys / 2];
        mbarrier_wait(block.keys_full(use), Block::phase(use));
        warpgroup_fence();
        issue_rows_product<T, QueryTile, KeyTile>(s, own_queries, block.keys(use));
        warpgroup_commit();
        warpgroup_wait<0>();
        settle(s);
        elected_arrive(block.keys_empty(use));
        finish(s, n, masks_at<Config>(rows.context, n));
        pack(s);
      }
      const auto step = [&](auto masked) {
        float s[kKeys / 2], part[Config::kAddsApart ? Config::kDim / 2 : 1];
        const bool checked = checked_at<Config>(p, rows.context, n + 1);
        mbarrier_wait(block.keys_full(use + 1), Block::phase(use + 1));
        if (kAlternate) named_barrier_sync(kTurnBarrier + group, 2 * kGroupThreads);
        warpgroup_fence();
        issue_rows_product<T, QueryTile, KeyTile>(s, own_queries, block.keys(use + 1));
        warpgroup_commit();
        wait_values(checked);
        warpgroup_fence();
        accumulate(part);
        warpgroup_commit();
        if (kAlternate) named_barrier_arrive(kTurnBarrier + (group + 1) % kGroups, 2 * kGroupThreads);
        warpgroup_wait<1>();
        settle(s);
        elected_arrive(block.keys_empty(use + 1));
        const float rescale_before[2] = {own.rescale[0], own.rescale[1]};
        finish(s, n, masked);
        if constexpr (Config::kPin) finish_before(own.sum[0] + own.sum[1]);
        warpgroup_wait<0>();
        if constexpr (Config::kAddsApart) {
          settle(part);
          add_rescaled(acc, part, rescale_before);
        } else {
          settle(acc);
        }
        release_values(n + 1, checked);
        pack(s);
        if constexpr (!Config::kAddsApart) rescale(acc, own);
        ++use;
      };
      for (--n; n >= rows.start; --n) {
        if constexpr (Config::kPlain) {
          if (masks_at<Config>(rows.context, n)) {
            step(Known<true>{});
          } else {
            step(Known<false>{});
          }
        } else {
          step(masks_at<Config>(rows.context, n));
        }
      }
      if constexpr (kOwnOut) elected_arrive(block.queries_empty());
      const bool checked = checked_at<Config>(p, rows.context, n + 1);
      wait_values(checked);
      float part[Config::kAddsApart ? Config::kDim / 2 : 1];
      warpgroup_fence();
      accumulate(part);
      warpgroup_commit();
      warpgroup_wait<0>();
      if constexpr (Config::kAddsApart) {
        settle(part);
        add_rescaled(acc, part, own.rescale);
      } else {
        settle(acc);
      }
      release_values(n + 1, checked);
      ++use;
    }

    const RowContext here = context();
    const PackedPlace at = place(here);
    const int b = at.batch;
    float factor[2];
    FASTATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int i = at.queries[half], h = at.head_at(0, 2 * half);
      const float sink = p.sink.data ? load_constant(p.sink.data + b * p.sink.batch + h) : -infinity();
      constexpr float kExponent = Config::kWeightExponent;
      const RowEnd end = end_row(own.largest[half] * multiplier[half] - kExponent, quad_sum(own.sum[half]), sink);
      const i64 row = (static_cast<i64>(b) * p.heads + h) * p.query_length + i;
      const bool stores = i < p.query_length && (lane_index() & 3) == 0;
      if constexpr (Config::kEight) {
        factor[half] = end.factor * scale_at(params.value_scale, b, h / p.group);
        if (stores) store_lse(end, params.lse, row);
      } else {
        factor[half] = end.factor * (p.dropout_seed ? p.keep_scale : 1.0f);
        if (stores) store_row_end(end, params.lse, params.statistics, row);
      }
    }
    if (rows.start < rows.end) {
      store(here.first_row, b, at.head, acc, factor);
      if constexpr (!kOwnOut) elected_arrive(block.queries_empty());
      ++round;
    } else {
      store.zeros(here.first_row, b, at.head);
    }
  });
  if (kOwnOut && store.issues()) bulk_wait_read<0>();  // shared memory is there until the last copy has read it
}

template <class Config>
FASTATTN_DEVICE void hopper_attention_forward(const HopperForwardParams& params) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const HopperBlock<Config> block;
  const int warp = warp_index();
  if (thread_index() == 0) {
    prefetch_tensor_map(&params.query.map);
    prefetch_tensor_map(&params.key.map);
    prefetch_tensor_map(&params.value.map);
    prefetch_tensor_map(&params.out.map);
    block.init();
  }
  sync_block();
  if (warp < 4) {
    registers_decrease<Config::kProducerRegisters>();
    if (warp == 0) {
      if (elect_one()) load_tiles<Config>(params, block);
    } else {
      check_tiles<Config>(params, block, warp_index() - 1);
    }
  } else {
    registers_increase<Config::kRegisters>();
    consume_tiles<Config>(params, block, warp_index() / 4 - 1);
  }
#endif
}

}  // namespace fastattn::cuda
