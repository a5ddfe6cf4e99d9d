#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

#include "hopper_kernels.h"
#ifndef __CUDACC__
#include "hopper_planted_bugs.h"
#endif
#include "run.h"

namespace fastattn::cuda::instruction_tests {

#define FASTATTN_PRODUCT_TESTS(X, type, T)               \
  X(products_##type##_16_0, (products<T, 16, 0>), 128)   \
  X(products_##type##_16_1, (products<T, 16, 1>), 128)   \
  X(products_##type##_48_0, (products<T, 48, 0>), 128)   \
  X(products_##type##_48_3, (products<T, 48, 3>), 128)   \
  X(products_##type##_64_0, (products<T, 64, 0>), 128)   \
  X(products_##type##_64_3, (products<T, 64, 3>), 128)   \
  X(products_##type##_64_5, (products<T, 64, 5>), 128)   \
  X(products_##type##_96_1, (products<T, 96, 1>), 128)   \
  X(products_##type##_96_2, (products<T, 96, 2>), 128)   \
  X(products_##type##_96_3, (products<T, 96, 3>), 128)   \
  X(products_##type##_128_1, (products<T, 128, 1>), 128) \
  X(products_##type##_128_2, (products<T, 128, 2>), 128) \
  X(products_##type##_128_4, (products<T, 128, 4>), 128) \
  X(products_##type##_176_0, (products<T, 176, 0>), 128) \
  X(products_##type##_256_1, (products<T, 256, 1>), 128) \
  X(products_##type##_256_5, (products<T, 256, 5>), 128) \
  X(matrix_product_##type##_0, (matrix_product<T, 0>), 384) X(matrix_product_##type##_1, (matrix_product<T, 1>), 384)

// n of the product, and 4 where A comes from registers
#define FASTATTN_8_BIT_TESTS(X)                         \
  X(products_e4m3_64_0, (products<E4M3, 64, 0>), 128)   \
  X(products_e4m3_96_4, (products<E4M3, 96, 4>), 128)   \
  X(products_e4m3_128_0, (products<E4M3, 128, 0>), 128) \
  X(products_e4m3_128_4, (products<E4M3, 128, 4>), 128) \
  X(products_e4m3_160_0, (products<E4M3, 160, 0>), 128) \
  X(products_e4m3_192_0, (products<E4M3, 192, 0>), 128) \
  X(products_e4m3_256_4, (products<E4M3, 256, 4>), 128) \
  X(pack_e4m3, (pack_e4m3), 64)                         \
  X(byte_permutations, (byte_permutations), 64)

// name, (function), threads
#define FASTATTN_HOPPER_TESTS(X)             \
  X(tensor_load_2d, (tensor_loads<2>), 64)   \
  X(tensor_load_3d, (tensor_loads<3>), 64)   \
  X(tensor_load_4d, (tensor_loads<4>), 64)   \
  X(tensor_load_5d, (tensor_loads<5>), 64)   \
  X(tensor_store_2d, (tensor_stores<2>), 64) \
  X(tensor_store_3d, (tensor_stores<3>), 64) \
  X(tensor_store_4d, (tensor_stores<4>), 64) \
  X(tensor_store_5d, (tensor_stores<5>), 64) \
  X(ring, (ring), 96)                        \
  X(bulk_copies, (bulk_copies), 32)          \
  X(elections, (elections), 64)              \
  FASTATTN_8_BIT_TESTS(X)                    \
  FASTATTN_PRODUCT_TESTS(X, f16, Half)       \
  FASTATTN_PRODUCT_TESTS(X, bf16, BFloat16)

#define FASTATTN_INSTANCE(name, function, threads) FASTATTN_KERNEL(test_##name, Params, function, threads, 1)
FASTATTN_HOPPER_TESTS(FASTATTN_INSTANCE)
#ifndef __CUDACC__
FASTATTN_HOPPER_PLANTED_BUGS(FASTATTN_INSTANCE)
#endif

bool run_on_hopper(const std::string& name, const Launch& launch, const Params& params) {
#define FASTATTN_RUN(test, function, threads) \
  if (name == #test) {                        \
    test_##test(launch, params);              \
    return true;                              \
  }
  FASTATTN_HOPPER_TESTS(FASTATTN_RUN)
#ifndef __CUDACC__
  FASTATTN_HOPPER_PLANTED_BUGS(FASTATTN_RUN)
#endif
  return false;
}

}  // namespace fastattn::cuda::instruction_tests

// For ctypes: null, or what went wrong.  `maps` has 128 bytes for each tensor map.
extern "C" __attribute__((visibility("default"))) const char* fastattn_hopper_test(const char* name,
                                                                                   const void* const* in,
                                                                                   void* const* out, const int* n,
                                                                                   const int* grid, int shared_bytes,
                                                                                   const void* maps) {
  static char error[512];
  fastattn::cuda::instruction_tests::Params params{};
  for (int i = 0; i < 4; ++i) params.in[i] = in[i], params.out[i] = out[i], params.n[i] = n[i];
  std::memcpy(params.maps, maps, sizeof params.maps);
  try {
    if (!fastattn::cuda::instruction_tests::run_on_hopper(
            name, {.grid_x = grid[0], .grid_y = grid[1], .grid_z = grid[2], .shared_bytes = shared_bytes}, params)) {
      throw std::invalid_argument(std::string("no instruction test is called ") + name);
    }
  } catch (const std::exception& exception) {
    std::snprintf(error, sizeof error, "%s", exception.what());
    return error;
  }
  return nullptr;
}
