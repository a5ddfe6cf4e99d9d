// The ring of the backward kernels: stages of two tiles that come together, as block.h describes it for one.
#pragma once

#include "products.h"
#include "tiles.h"

namespace fastattn::cuda {

template <class Tile, int kStages>
struct Ring {
  static_assert((kStages & (kStages - 1)) == 0);
  SharedAddress tiles, barriers;

  static FASTATTN_DEVICE uint32_t stage(int use) { return static_cast<uint32_t>(use) % kStages; }
  static FASTATTN_DEVICE uint32_t phase(int use) { return static_cast<uint32_t>(use) / kStages & 1; }
  static FASTATTN_DEVICE uint32_t phase_before(int use) { return phase(use) ^ 1; }

  FASTATTN_DEVICE SharedAddress first(int use) const { return tiles + stage(use) * 2 * Tile::kBytes; }
  FASTATTN_DEVICE SharedAddress second(int use) const { return first(use) + Tile::kBytes; }
  FASTATTN_DEVICE SharedAddress full(int use) const { return barriers + 8 * stage(use); }
  FASTATTN_DEVICE SharedAddress empty(int use) const { return full(use) + 8 * kStages; }
  FASTATTN_DEVICE SharedAddress checked(int use) const { return full(use) + 16 * kStages; }

  FASTATTN_DEVICE void init(int consumer_warps) const {
    for (int use = 0; use < kStages; ++use) {
      mbarrier_init(full(use), 2);  // an arrival for each tile
      mbarrier_init(empty(use), consumer_warps);
      mbarrier_init(checked(use), kCheckers);
    }
  }

  FASTATTN_DEVICE void wait_empty(int use) const { mbarrier_wait(empty(use), phase_before(use)); }
  FASTATTN_DEVICE void wait(int use, bool careful) const {
    if (!careful) mbarrier_wait(full(use), phase(use));
    mbarrier_wait(checked(use), phase(use));
  }
};

// Zeroes what is not finite in tiles that lie one after the other: this warp's share of the checkers'.
template <class T, int kBytes>
FASTATTN_DEVICE void clean(SharedAddress tiles, int checker) {
  FASTATTN_NO_UNROLL
  for (int at = 16 * (32 * checker + lane_index()); at < kBytes; at += 16 * 32 * kCheckers) {
    Vec4 chunk = load_shared<Vec4>(tiles + at);
    bool changed = false;
    FASTATTN_UNROLL
    for (int n = 0; n < 4; ++n) {
      const uint32_t finite = finite_or_zero<T>(chunk.x[n]);
      changed = changed || finite != chunk.x[n];
      chunk.x[n] = finite;
    }
    if (changed) store_shared(tiles + at, chunk);
  }
  fence_async_shared();
}

// One arrival for the warp, when all its lanes have come.
FASTATTN_DEVICE void warp_arrive(SharedAddress barrier) {
  sync_warp();
  if (lane_index() == 0) mbarrier_arrive(barrier);
}

}  // namespace fastattn::cuda
