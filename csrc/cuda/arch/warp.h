// What the 32 lanes of a warp do together.  Every lane must come to the same call: one that does not is undefined on
// the chip and an error in the simulator.  None of these but sync_warp orders memory between lanes.
#pragma once

#include "config.h"

namespace fastattn::cuda {

// The value of another lane.  `source_lane` is taken modulo 32.  V: float, int, uint32_t.
template <class V>
FASTATTN_DEVICE V shuffle(V value, int source_lane FASTATTN_WHERE) {
  static_assert(sizeof(V) == 4);
#ifdef __CUDACC__
  return __shfl_sync(0xFFFFFFFFu, value, source_lane);
#else
  return sim::from_bits<V>(sim::shuffle(sim::Shuffle::kIndex, sim::to_bits(value), source_lane, where));
#endif
}

template <class V>
FASTATTN_DEVICE V shuffle_xor(V value, int lane_mask FASTATTN_WHERE) {
  static_assert(sizeof(V) == 4);
#ifdef __CUDACC__
  return __shfl_xor_sync(0xFFFFFFFFu, value, lane_mask);
#else
  return sim::from_bits<V>(sim::shuffle(sim::Shuffle::kXor, sim::to_bits(value), lane_mask, where));
#endif
}

// The value of the lane `delta` below; the lowest `delta` lanes keep their own.
template <class V>
FASTATTN_DEVICE V shuffle_up(V value, int delta FASTATTN_WHERE) {
  static_assert(sizeof(V) == 4);
#ifdef __CUDACC__
  return __shfl_up_sync(0xFFFFFFFFu, value, delta);
#else
  return sim::from_bits<V>(sim::shuffle(sim::Shuffle::kUp, sim::to_bits(value), delta, where));
#endif
}

// The value of the lane `delta` above; the highest `delta` lanes keep their own.
template <class V>
FASTATTN_DEVICE V shuffle_down(V value, int delta FASTATTN_WHERE) {
  static_assert(sizeof(V) == 4);
#ifdef __CUDACC__
  return __shfl_down_sync(0xFFFFFFFFu, value, delta);
#else
  return sim::from_bits<V>(sim::shuffle(sim::Shuffle::kDown, sim::to_bits(value), delta, where));
#endif
}

// Bit i is lane i's predicate.
FASTATTN_DEVICE uint32_t ballot(bool predicate FASTATTN_WHERE) {
#ifdef __CUDACC__
  return __ballot_sync(0xFFFFFFFFu, predicate);
#else
  return sim::ballot(predicate, where);
#endif
}

FASTATTN_DEVICE bool any_lane(bool predicate FASTATTN_WHERE) {
#ifdef __CUDACC__
  return __any_sync(0xFFFFFFFFu, predicate);
#else
  return sim::ballot(predicate, where) != 0;
#endif
}

FASTATTN_DEVICE bool all_lanes(bool predicate FASTATTN_WHERE) {
#ifdef __CUDACC__
  return __all_sync(0xFFFFFFFFu, predicate);
#else
  return sim::ballot(predicate, where) == 0xFFFFFFFFu;
#endif
}

// Lanes meet, and what each wrote before is seen by all after.
FASTATTN_DEVICE void sync_warp(FASTATTN_WHERE_ONLY) {
#ifdef __CUDACC__
  __syncwarp();
#else
  sim::sync_warp(where);
#endif
}

}  // namespace fastattn::cuda
