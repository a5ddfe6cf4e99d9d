// Who and where a thread is.  Blocks are one-dimensional, grids up to three.
#pragma once

#include "config.h"

namespace fastattn::cuda {

inline constexpr int kWarpSize = 32;

#ifdef __CUDACC__
FASTATTN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
FASTATTN_DEVICE int block_threads() { return static_cast<int>(blockDim.x); }
FASTATTN_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
FASTATTN_DEVICE int block_index_y() { return static_cast<int>(blockIdx.y); }
FASTATTN_DEVICE int block_index_z() { return static_cast<int>(blockIdx.z); }
FASTATTN_DEVICE int grid_size() { return static_cast<int>(gridDim.x); }
FASTATTN_DEVICE int grid_size_y() { return static_cast<int>(gridDim.y); }
FASTATTN_DEVICE int grid_size_z() { return static_cast<int>(gridDim.z); }
#else
inline int thread_index() { return sim::position().thread; }
inline int block_threads() { return sim::position().threads; }
inline int block_index() { return sim::position().block[0]; }
inline int block_index_y() { return sim::position().block[1]; }
inline int block_index_z() { return sim::position().block[2]; }
inline int grid_size() { return sim::position().grid[0]; }
inline int grid_size_y() { return sim::position().grid[1]; }
inline int grid_size_z() { return sim::position().grid[2]; }
#endif

// The same, read where it is written: a thread_index() that is needed at both ends of a long loop takes a register all
// the way.
FASTATTN_DEVICE int thread_index_again() {
#ifdef __CUDACC__
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
#else
  return thread_index();
#endif
}

FASTATTN_DEVICE int lane_index() { return thread_index() % kWarpSize; }

// The same value in all lanes, and the compiler is told so: branches on it stay uniform.
FASTATTN_DEVICE int warp_index() {
#ifdef __CUDACC__
  return __shfl_sync(0xFFFFFFFFu, static_cast<int>(threadIdx.x) / kWarpSize, 0);
#else
  return thread_index() / kWarpSize;
#endif
}

}  // namespace fastattn::cuda
