// FASTATTN_KERNEL(name, Params, (device_function), threads, min_blocks): an instance of a kernel and the function that
// launches it,
//     void name(const Launch&, const Params&);
// which throws std::runtime_error with the reason.  `min_blocks` is what a multiprocessor must hold at once; it bounds
// the registers.  Declare the function for host code with FASTATTN_DECLARE_KERNEL(name, Params).
// Both are used inside namespace fastattn::cuda.
#pragma once

#include "config.h"
#include "launch.h"

#define FASTATTN_DECLARE_KERNEL(name, Params) void name(const ::fastattn::cuda::Launch&, const Params&)

#ifdef __CUDACC__

#include <cuda_runtime.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace fastattn::cuda::detail {

inline constexpr int kMaxDevices = 64;

// `raised[device]`: this kernel may use all the shared memory of that device, beyond the 48 KB that need no asking.
inline void launch_kernel(const void* kernel, const char* name, int threads, std::atomic<bool> (&raised)[kMaxDevices],
                          const Launch& launch, const void* params) {
  const auto fail = [&](const std::string& reason) {
    throw std::runtime_error("CUDA kernel " + std::string(name) + ", grid (" + std::to_string(launch.grid_x) + ", " +
                             std::to_string(launch.grid_y) + ", " + std::to_string(launch.grid_z) + "), " +
                             std::to_string(threads) + " threads, " + std::to_string(launch.shared_bytes) +
                             " bytes of shared memory: " + reason);
  };
  const auto check = [&](cudaError_t status) {
    if (status != cudaSuccess) fail(cudaGetErrorString(status));
  };
  if (launch.grid_x < 1 || launch.grid_y < 1 || launch.grid_z < 1) fail("the grid is empty");
  if (launch.grid_y > 65535 || launch.grid_z > 65535) fail("a grid has at most 65535 blocks along y and z");
  if (launch.shared_bytes < 0) fail("negative size of shared memory");
  if (launch.shared_bytes > 48 * 1024) {
    int device = 0;
    check(cudaGetDevice(&device));
    const bool known = device < kMaxDevices;
    if (!known || !raised[device].load(std::memory_order_relaxed)) {
      int limit = 0;
      check(cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
      if (launch.shared_bytes > limit) fail("this device has " + std::to_string(limit) + " bytes for a block");
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit));
      if (known) raised[device].store(true, std::memory_order_relaxed);
    }
  }
  void* arguments[] = {const_cast<void*>(params)};
  const dim3 grid(launch.grid_x, launch.grid_y, launch.grid_z);
  check(cudaLaunchKernel(kernel, grid, dim3(threads), arguments, launch.shared_bytes,
                         static_cast<cudaStream_t>(launch.stream)));
  check(cudaGetLastError());
}

}  // namespace fastattn::cuda::detail

#define FASTATTN_KERNEL(name, Params, function, threads, min_blocks)                                              \
  __global__ void __launch_bounds__(threads, min_blocks) name##_kernel(const __grid_constant__ Params params) {   \
    function(params);                                                                                             \
  }                                                                                                               \
  void name(const ::fastattn::cuda::Launch& launch, const Params& params) {                                       \
    static std::atomic<bool> raised[::fastattn::cuda::detail::kMaxDevices];                                       \
    ::fastattn::cuda::detail::launch_kernel(reinterpret_cast<const void*>(name##_kernel), #name, threads, raised, \
                                            launch, &params);                                                     \
  }

#else

#define FASTATTN_KERNEL(name, Params, function, threads, min_blocks)                                \
  void name(const ::fastattn::cuda::Launch& launch, const Params& params) {                         \
    static_assert((min_blocks) >= 1);                                                               \
    ::fastattn::cuda::sim::launch(#name, threads, min_blocks, launch, &params,                      \
                                  [](const void* p) { function(*static_cast<const Params*>(p)); }); \
  }

#endif
