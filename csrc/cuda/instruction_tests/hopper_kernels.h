// One small kernel for each instruction of sm_90a, as kernels.h has them for sm_80.
#pragma once

#include "../arch/arch.h"
#include "../arch/hopper.h"
#include "kernels.h"
#include "run.h"

namespace fastattn::cuda::instruction_tests {

// A box through shared memory as it lies there.  in0 int[6]: bytes of the box, coordinates -> out0 the bytes
template <int kRank>
FASTATTN_DEVICE void load_box(const Params& p, SharedAddress to, SharedAddress barrier, const int* at FASTATTN_WHERE) {
  constexpr CachePolicy kPolicy = CachePolicy::kNormal;
  const TensorMap* map = &p.maps[0];
  if constexpr (kRank == 2) tensor_load_2d(to, map, barrier, at[0], at[1], kPolicy FASTATTN_HERE);
  if constexpr (kRank == 3) tensor_load_3d(to, map, barrier, at[0], at[1], at[2], kPolicy FASTATTN_HERE);
  if constexpr (kRank == 4) tensor_load_4d(to, map, barrier, at[0], at[1], at[2], at[3], kPolicy FASTATTN_HERE);
  if constexpr (kRank == 5) tensor_load_5d(to, map, barrier, at[0], at[1], at[2], at[3], at[4], kPolicy FASTATTN_HERE);
}

template <int kRank>
FASTATTN_DEVICE void tensor_loads(const Params& p) {
  const int bytes = input<int>(p, 0, 0);
  const SharedAddress box = shared_base(), barrier = box + static_cast<uint32_t>(bytes);
  if (thread_index() == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    prefetch_tensor_map(&p.maps[0]);
    int at[5];
    for (int i = 0; i < 5; ++i) at[i] = input<int>(p, 0, 1 + i);
    mbarrier_arrive_expect(barrier, static_cast<uint32_t>(bytes));
    load_box<kRank>(p, box, barrier, at);
  }
  sync_block();
  mbarrier_wait(barrier, 0);
  for (int i = thread_index(); i < bytes / 16; i += block_threads()) {
    output(p, 0, i, load_shared<Vec4>(box + 16 * static_cast<uint32_t>(i)));
  }
}

// The other way.  in0 int[6]: bytes of the box, coordinates; in1 the bytes as they lie in shared memory
template <int kRank>
FASTATTN_DEVICE void tensor_stores(const Params& p) {
  const int bytes = input<int>(p, 0, 0);
  const SharedAddress box = shared_base();
  for (int i = thread_index(); i < bytes / 16; i += block_threads()) {
    store_shared(box + 16 * static_cast<uint32_t>(i), input<Vec4>(p, 1, i));
  }
  fence_async_shared();
  sync_block();
  if (thread_index() == 0) {
    int c[5];
    for (int i = 0; i < 5; ++i) c[i] = input<int>(p, 0, 1 + i);
    const TensorMap* map = &p.maps[0];
    if constexpr (kRank == 2) tensor_store_2d(map, box, c[0], c[1]);
    if constexpr (kRank == 3) tensor_store_3d(map, box, c[0], c[1], c[2]);
    if constexpr (kRank == 4) tensor_store_4d(map, box, c[0], c[1], c[2], c[3]);
    if constexpr (kRank == 5) tensor_store_5d(map, box, c[0], c[1], c[2], c[3], c[4]);
    bulk_commit();
    bulk_wait_read<0>();
  }
  sync_block();
  // The source may be used again.
  for (int i = thread_index(); i < bytes / 16; i += block_threads()) {
    store_shared(box + 16 * static_cast<uint32_t>(i), Vec4{});
  }
}

// A ring of two stages: the first warp brings boxes, the others add them up.  The box is 32 numbers; n0 boxes.
// Map 0: float[n0][32].  out0 float[threads / 32 - 1][32] sums
FASTATTN_DEVICE void ring(const Params& p) {
  constexpr uint32_t kStages = 2, kBytes = 128;
  const SharedAddress box = shared_base(), full = box + kStages * kBytes, empty = full + kStages * 8;
  const int consumers = block_threads() / 32 - 1;
  if (thread_index() == 0) {
    for (uint32_t stage = 0; stage < kStages; ++stage) {
      mbarrier_init(full + 8 * stage, 1);
      mbarrier_init(empty + 8 * stage, static_cast<uint32_t>(consumers));
    }
    mbarrier_init_fence();
  }
  sync_block();
  float sum = 0;
  if (warp_index() == 0) {
    if (elect_one()) {
      for (uint32_t i = 0; i < static_cast<uint32_t>(p.n[0]); ++i) {
        const uint32_t stage = i % kStages, phase = i / kStages % 2;
        mbarrier_wait(empty + 8 * stage, phase ^ 1);
        mbarrier_arrive_expect(full + 8 * stage, kBytes);
        tensor_load_2d(box + kBytes * stage, &p.maps[0], full + 8 * stage, 0, static_cast<int>(i),
                       CachePolicy::kNormal);
      }
    }
    return;
  }
  for (uint32_t i = 0; i < static_cast<uint32_t>(p.n[0]); ++i) {
    const uint32_t stage = i % kStages, phase = i / kStages % 2;
    while (!mbarrier_try_wait(full + 8 * stage, phase)) {
    }
    sum += load_shared<float>(box + kBytes * stage + 4 * static_cast<uint32_t>(lane_index()));
    sync_warp();
    if (lane_index() == 0) mbarrier_arrive(empty + 8 * stage);
  }
  output(p, 0, thread_index() - 32, sum);
}

// in0 float[n0] through shared memory, added to out0 float[n0] by each of the blocks: by the last thread, so that none
// is left to run while it waits
FASTATTN_DEVICE void bulk_copies(const Params& p) {
  const uint32_t bytes = 4 * static_cast<uint32_t>(p.n[0]);
  const SharedAddress numbers = shared_base(), barrier = numbers + bytes;
  if (thread_index() == block_threads() - 1) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
    mbarrier_expect(barrier, bytes);
    bulk_load(numbers, p.in[0], bytes, barrier);
    mbarrier_arrive(barrier);
    mbarrier_wait(barrier, 0);
    mbarrier_invalidate(barrier);
    bulk_reduce_add(static_cast<float*>(p.out[0]), numbers, bytes);
    bulk_commit();
    bulk_wait<0>();
  }
}

// Steps of d += a b.  kKind: bit 0 transposes B, bit 1 transposes A, bit 2 takes A from registers.  n0: bytes of in0,
// which is what shared memory holds; n1: steps.  in1 uint64[steps][2]: descriptors with addresses that count from the
// beginning; in2 uint32[steps][128][4] registers.  out0 float[128][N / 2]: d before and after
template <class T, int N, int kKind>
FASTATTN_DEVICE void products(const Params& p) {
  using Multiply = WarpgroupMultiply<T, N>;
  const int thread = thread_index();
  for (int i = thread; i < p.n[0] / 16; i += block_threads()) {
    store_shared(shared_base() + 16 * static_cast<uint32_t>(i), input<Vec4>(p, 0, i));
  }
  fence_async_shared();
  sync_block();
  float d[N / 2];
  FASTATTN_UNROLL
  for (int i = 0; i < N / 2; ++i) d[i] = load_global(static_cast<float*>(p.out[0]) + thread * (N / 2) + i);
  FASTATTN_NO_UNROLL
  for (int step = 0; step < p.n[1]; ++step) {
    const uint64_t a = input<uint64_t>(p, 1, 2 * step) + shared_base() / 16;
    const uint64_t b = input<uint64_t>(p, 1, 2 * step + 1) + shared_base() / 16;
    if constexpr (kKind < 4) {
      warpgroup_fence();
      Multiply::template shared<(kKind >> 1), (kKind & 1)>(d, a, b, true);
    } else {
      uint32_t r[4];
      FASTATTN_UNROLL
      for (int i = 0; i < 4; ++i) r[i] = input<uint32_t>(p, 2, (step * 128 + thread) * 4 + i);
      warpgroup_fence();
      Multiply::template registers<(kKind & 1)>(d, r, b, true);
    }
    warpgroup_commit();
    warpgroup_wait<0>();
  }
  FASTATTN_UNROLL
  for (int i = 0; i < N / 2; ++i) output(p, 0, thread * (N / 2) + i, d[i]);
}

// in0 float[4 n0] -> out0 uint32[n0]
FASTATTN_DEVICE void pack_e4m3(const Params& p) {
  for (int i = thread_index(); i < p.n[0]; i += block_threads()) {
    float x[4];
    for (int n = 0; n < 4; ++n) x[n] = input<float>(p, 0, 4 * i + n);
    output(p, 0, i, pack4(x[0], x[1], x[2], x[3]));
  }
}

// in0 uint32[n0][3]: two words and a selector -> out0 uint32[n0]
FASTATTN_DEVICE void byte_permutations(const Params& p) {
  for (int i = thread_index(); i < p.n[0]; i += block_threads()) {
    output(p, 0, i,
           permute_bytes(input<uint32_t>(p, 0, 3 * i), input<uint32_t>(p, 0, 3 * i + 1),
                         input<uint32_t>(p, 0, 3 * i + 2)));
  }
}

// A tile of a matrix product as kernels make it: map 0 is a [128][128], map 1 is b [128][128], both in boxes of 64 rows
// and 64 columns with rows of 128 bytes.  Two warpgroups with 64 rows each; a third one brings the data.
// out0 float[128][128]: a b^T, or with kTransposed a b
template <class T, int kTransposed>
FASTATTN_DEVICE void matrix_product(const Params& p) {
  constexpr uint32_t kBox = 64 * 128, kTile = 4 * kBox;  // a tile is two panels of 64 columns
  const SharedAddress a = shared_base(), b = a + kTile, barrier = b + kTile;
  if (thread_index() == 0) {
    mbarrier_init(barrier, 1);
    mbarrier_init_fence();
  }
  sync_block();
  if (warp_index() < 4) {
    registers_decrease<24>();
    if (warp_index() == 0 && elect_one()) {
      mbarrier_arrive_expect(barrier, 2 * kTile);
      for (uint32_t box = 0; box < 4; ++box) {
        const int column = static_cast<int>(box / 2 * 64), row = static_cast<int>(box % 2 * 64);
        tensor_load_2d(a + box * kBox, &p.maps[0], barrier, column, row, CachePolicy::kEvictFirst);
        tensor_load_2d(b + box * kBox, &p.maps[1], barrier, column, row, CachePolicy::kEvictLast);
      }
    }
    return;
  }
  registers_increase<240>();
  const int group = warp_index() / 4 - 1;
  float d[64];
  mbarrier_wait(barrier, 0);
  const uint64_t rows = matrix_descriptor(a + static_cast<uint32_t>(group) * kBox, 16, 1024, Swizzle::k128);
  warpgroup_fence();
  FASTATTN_UNROLL
  for (uint32_t k = 0; k < 8; ++k) {
    const uint64_t at = k / 4 * (2 * kBox / 16) + k % 4 * 2;
    if constexpr (kTransposed == 0) {
      const uint64_t columns = matrix_descriptor(b, 16, 1024, Swizzle::k128);
      WarpgroupMultiply<T, 128>::template shared<0, 0>(d, rows + at, columns + at, k > 0);
    } else {
      const uint64_t columns = matrix_descriptor(b, 2 * kBox, 1024, Swizzle::k128);
      WarpgroupMultiply<T, 128>::template shared<0, 1>(d, rows + at, columns + k * (16 * 128 / 16), k > 0);
    }
  }
  warpgroup_commit();
  warpgroup_wait<0>();
  const int thread = thread_index() % 128, row = group * 64 + thread / 32 * 16 + thread % 32 / 4;
  FASTATTN_UNROLL
  for (int i = 0; i < 64; ++i) {
    output(p, 0, (row + i / 2 % 2 * 8) * 128 + i / 4 * 8 + thread % 4 * 2 + i % 2, d[i]);
  }
}

// out0 int[threads]: 1 for the one lane of each warp
FASTATTN_DEVICE void elections(const Params& p) { output(p, 0, thread_index(), int{elect_one()}); }

}  // namespace fastattn::cuda::instruction_tests
