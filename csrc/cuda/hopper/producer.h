// The warpgroup that brings tiles: one thread issues every copy, the other three warps look for what is not finite.
//
// 0 * NaN is NaN: a value that a mask hides would leak through its weight of zero.  In tiles that are masked, the
// checkers zero rows of values that are not finite before any consumer uses them, and say which; consumers turn rows
// that do see one into NaN.  Tiles that all rows see in full are nobody's concern: what is in them is seen.
#pragma once

#include "transpose.h"

namespace fastattn::cuda {

// Keys run one tile ahead of values, as consumers use them.  Tiles go from the last to the first: those that need
// masks, at the right edge, come first.
template <class Config>
FASTATTN_DEVICE void load_tiles(const HopperForwardParams& params, const HopperBlock<Config>& block) {
  using Block = HopperBlock<Config>;
  using KeyTile = typename Config::KeyTile;
  int use = 0, round = 0;  // next use of the ring for keys; tiles of queries so far
  for_own_rows<Config>(params.schedule, params.attention, params.packing, [&](const QueryRows& rows) {
    if (rows.start >= rows.end) return;
    const int b = rows.context.batch, h = rows.context.head, kv = h / params.attention.group;
    for (int n = rows.end - 1; n >= rows.start - 1; --n) {
      if (n >= rows.start) {
        mbarrier_wait(block.keys_empty(use), Block::phase_before(use));
        load_tile<KeyTile>(block.keys(use), params.key, block.keys_full(use), n * Config::kKeys, kv, b,
                           CachePolicy::kEvictLast);
        ++use;
      }
      if (n == rows.end - 1) {
        mbarrier_wait(block.queries_empty(), (round & 1) ^ 1);
        load_packed_tile<typename Config::QueryTile>(block.queries(), params.query, params.packing,
                                                     block.queries_full(), rows.m0, h, b, CachePolicy::kEvictFirst);
        ++round;
      } else {
        const int before = use - (n >= rows.start ? 2 : 1);
        mbarrier_wait(block.arrivals_empty(before), Block::phase_before(before));
        load_tile<KeyTile>(block.arrivals(before), params.value, block.values_full(before), (n + 1) * Config::kKeys, kv,
                           b, CachePolicy::kEvictLast);
      }
    }
  });
}

// Zeroes this warp's rows of a tile of values that are not finite, and says which.  A lane looks at the same 16 bytes
// of each panel's row, whatever chunk the swizzle put there.
template <class Config>
FASTATTN_DEVICE void check_values(SharedAddress tile, SharedAddress checks, int checker) {
  using T = typename Config::T;
  using KeyTile = typename Config::KeyTile;
  constexpr int kLanes = KeyTile::kRowBytes / 16, kRows = 32 / kLanes, kPanels = KeyTile::kDim / KeyTile::kPanelColumns;
  const int lane = lane_index();
  bool found = false;
  FASTATTN_NO_UNROLL
  for (int row = kRows * checker; row < Config::kKeys; row += kRows * kCheckers) {
    const SharedAddress own = tile + row * KeyTile::kRowBytes + lane * 16;
    bool bad = false;
    FASTATTN_NO_UNROLL
    for (int panel = 0; panel < kPanels; ++panel) {
      const Vec4 chunk = load_shared<Vec4>(own + panel * KeyTile::kPanelBytes);
      FASTATTN_UNROLL
      for (int n = 0; n < 4; ++n) bad = bad || finite_or_zero<T>(chunk.x[n]) != chunk.x[n];
    }
    bad = (ballot(bad) >> (lane & ~(kLanes - 1)) & ((1u << kLanes) - 1)) != 0;  // any lane of the row
    if (bad) {
      FASTATTN_NO_UNROLL
      for (int panel = 0; panel < kPanels; ++panel)
        store_shared(own + panel * KeyTile::kPanelBytes, Vec4{{0, 0, 0, 0}});
    }
    if (lane % kLanes == 0) store_shared<uint8_t>(checks + 16 + row + lane / kLanes, bad);
    found = found || bad;
  }
  found = any_lane(found);
  if (lane == 0) store_shared<uint32_t>(checks + 4 * checker, found);
  fence_async_shared();  // zeros are seen by the products
}

template <class Config>
FASTATTN_DEVICE void check_tiles(const HopperForwardParams& params, const HopperBlock<Config>& block, int checker) {
  using Block = HopperBlock<Config>;
  int use = 0;
  for_own_rows<Config>(params.schedule, params.attention, params.packing, [&](const QueryRows& rows) {
    for (int n = rows.end - 1; n >= rows.start; --n, ++use) {
      // A phase for every use, and no further ahead than the ring is long: a wait for a phase passes as well while the
      // one before it is not complete.
      mbarrier_wait(block.values_empty(use), Block::phase_before(use));
      const bool checked = checked_at<Config>(params.attention, rows.context, n);
      if constexpr (Config::kEight) {
        mbarrier_wait(block.values_full(use), Block::phase(use));
        transpose_values<Config>(block.arrivals(use), block.values(use), block.checks(use), checker, checked);
        warp_arrive(block.arrivals_empty(use));
      } else if (checked) {
        mbarrier_wait(block.values_full(use), Block::phase(use));
        check_values<Config>(block.values(use), block.checks(use), checker);
      }
      warp_arrive(block.values_checked(use));
    }
  });
}

}  // namespace fastattn::cuda
