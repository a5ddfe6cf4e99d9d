// Every sm_90a instruction of the layer once, so that each is seen to assemble.  Compiled by nvcc, never started.
#include "../arch/arch.h"
#include "../arch/hopper.h"

namespace fastattn::cuda::instruction_tests {

struct HopperParams {
  TensorMap map;
  float* out;
};

template <class T, int N>
FASTATTN_DEVICE float product(SharedAddress tile) {
  float d[N / 2] = {};
  const uint32_t a[4] = {tile, tile, tile, tile};
  const uint64_t operand = matrix_descriptor(tile, 16, 1024, Swizzle::k128);
  warpgroup_fence();
  WarpgroupMultiply<T, N>::template shared<0, 0>(d, operand, operand, false);
  WarpgroupMultiply<T, N>::template shared<1, 1>(d, operand, operand, true);
  WarpgroupMultiply<T, N>::template registers<0>(d, a, operand, true);
  WarpgroupMultiply<T, N>::template registers<1>(d, a, operand, true);
  warpgroup_commit();
  warpgroup_wait<0>();
  float sum = 0;
  for (int i = 0; i < N / 2; ++i) sum += d[i];
  return sum;
}

template <class T, int... kSixteens>
FASTATTN_DEVICE float products(SharedAddress tile) {
  return (product<T, 16 * kSixteens>(tile) + ...);
}

template <int N>
FASTATTN_DEVICE float product_of_8_bits(SharedAddress tile) {
  float d[N / 2] = {};
  const uint32_t a[4] = {tile, tile, tile, pack4(1, 2, 3, d[0])};
  const uint64_t operand = matrix_descriptor(tile, 16, 1024, Swizzle::k128);
  warpgroup_fence();
  WarpgroupMultiply<E4M3, N>::template shared<0, 0>(d, operand, operand, false);
  WarpgroupMultiply<E4M3, N>::template registers<0>(d, a, operand, true);
  warpgroup_commit();
  warpgroup_wait<0>();
  float sum = 0;
  for (int i = 0; i < N / 2; ++i) sum += d[i];
  return sum + float_of(permute_bytes(tile, a[3], 0x7531));
}

template <int... kN>
FASTATTN_DEVICE float products_of_8_bits(SharedAddress tile) {
  return (product_of_8_bits<kN>(tile) + ...);
}

FASTATTN_DEVICE void every_instruction(const HopperParams& p) {
  const SharedAddress tile = shared_base(), barrier = tile + 8192;
  if (elect_one()) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
  }
  sync_block();
  prefetch_tensor_map(&p.map);
  mbarrier_arrive_expect(barrier, 128);
  mbarrier_expect(barrier, 12);
  mbarrier_arrive(barrier);
  tensor_load_2d(tile, &p.map, barrier, 0, 1, CachePolicy::kNormal);
  tensor_load_3d(tile, &p.map, barrier, 0, 1, 2, CachePolicy::kEvictFirst);
  tensor_load_4d(tile, &p.map, barrier, 0, 1, 2, 3, CachePolicy::kEvictLast);
  tensor_load_5d(tile, &p.map, barrier, 0, 1, 2, 3, 4, CachePolicy::kEvictLast);
  bulk_load(tile, p.out, 64, barrier);
  mbarrier_wait(barrier, 0);
  mbarrier_invalidate(barrier);
  if (warp_index() < 4) {
    registers_decrease<24>();
  } else {
    registers_increase<240>();
  }
  const uint32_t r[4] = {1, 2, 3, 4};
  store_matrix_x4(tile, r);
  store_matrix_x4_transposed(tile, r);
  fence_async_shared();
  tensor_store_2d(&p.map, tile, 0, 1);
  tensor_store_3d(&p.map, tile, 0, 1, 2);
  tensor_store_4d(&p.map, tile, 0, 1, 2, 3);
  tensor_store_5d(&p.map, tile, 0, 1, 2, 3, 4);
  bulk_reduce_add(p.out, tile, 64);
  bulk_commit();
  bulk_wait<1>();
  bulk_wait_read<0>();
  store_global(p.out, products<Half, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16>(tile) +
                          products<BFloat16, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16>(tile) +
                          products_of_8_bits<64, 96, 128, 160, 192, 256>(tile));
}

FASTATTN_KERNEL(hopper_every_instruction, HopperParams, (every_instruction), 256, 1)

}  // namespace fastattn::cuda::instruction_tests
