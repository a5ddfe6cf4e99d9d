// Barriers of a thread block.  What a thread wrote before it arrives is seen after by those that waited.
#pragma once

#include "config.h"

namespace fastattn::cuda {

FASTATTN_DEVICE void sync_block(FASTATTN_WHERE_ONLY) {
#ifdef __CUDACC__
  __syncthreads();
#else
  sim::sync_block(false, where);
#endif
}

// Whether any thread's predicate holds.
FASTATTN_DEVICE bool sync_block_or(bool predicate FASTATTN_WHERE) {
#ifdef __CUDACC__
  return __syncthreads_or(predicate) != 0;
#else
  return sim::sync_block(predicate, where) != 0;
#endif
}

// How many threads' predicates hold.
FASTATTN_DEVICE int sync_block_count(bool predicate FASTATTN_WHERE) {
#ifdef __CUDACC__
  return __syncthreads_count(predicate);
#else
  return sim::sync_block(predicate, where);
#endif
}

// Barrier `id` (1 to 15; 0 is sync_block's) completes when `threads`, a multiple of 32, have arrived: whole warps, of
// which those that sync wait and those that only arrive go on.
FASTATTN_DEVICE void named_barrier_sync(int id, int threads FASTATTN_WHERE) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  sim::named_barrier(id, threads, /*wait=*/true, where);
#endif
}

FASTATTN_DEVICE void named_barrier_arrive(int id, int threads FASTATTN_WHERE) {
#ifdef __CUDACC__
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  sim::named_barrier(id, threads, /*wait=*/false, where);
#endif
}

}  // namespace fastattn::cuda
