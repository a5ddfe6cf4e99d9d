// Kernels for sm_90a with one bug each, which the simulator must find.  They are never compiled for a GPU.
// Map 0 is a [64][64] of 16-bit numbers in boxes of that size, in0; out0 float[256].
#pragma once

#include "hopper_kernels.h"

namespace fastattn::cuda::instruction_tests {

inline constexpr uint32_t kBoxBytes = 64 * 128;
FASTATTN_DEVICE SharedAddress box_at(uint32_t i) { return shared_base() + kBoxBytes * i; }
FASTATTN_DEVICE SharedAddress barrier_at(uint32_t i) { return box_at(3) + 8 * i; }

FASTATTN_DEVICE void init_barriers(uint32_t arrivals, uint32_t count = 2 FASTATTN_WHERE) {
  if (thread_index() == 0) {
    for (uint32_t i = 0; i < count; ++i) mbarrier_init(barrier_at(i), arrivals FASTATTN_HERE);
    mbarrier_init_fence();
  }
  sync_block();
}
FASTATTN_DEVICE void load_box(const Params& p, uint32_t box, uint32_t barrier FASTATTN_WHERE) {
  tensor_load_2d(box_at(box), &p.maps[0], barrier_at(barrier), 0, 0, CachePolicy::kNormal FASTATTN_HERE);
}
// One thread brings a box and all wait for it.
FASTATTN_DEVICE void bring_box(const Params& p, uint32_t box, uint32_t barrier, uint32_t phase) {
  if (thread_index() == 0) {
    mbarrier_arrive_expect(barrier_at(barrier), kBoxBytes);
    load_box(p, box, barrier);
  }
  mbarrier_wait(barrier_at(barrier), phase);
}
// All write a box.
FASTATTN_DEVICE void write_box(uint32_t box FASTATTN_WHERE) {
  for (uint32_t at = 16 * static_cast<uint32_t>(thread_index()); at < kBoxBytes;
       at += 16 * static_cast<uint32_t>(block_threads())) {
    store_shared(box_at(box) + at, Vec4 {} FASTATTN_HERE);
  }
}
FASTATTN_DEVICE float first_of(uint32_t box FASTATTN_WHERE) {
  return load_shared<float>(box_at(box) + 4 * static_cast<uint32_t>(thread_index()) FASTATTN_HERE);
}
FASTATTN_DEVICE uint64_t operand(uint32_t box) { return matrix_descriptor(box_at(box), 16, 1024, Swizzle::k128); }
using Product = WarpgroupMultiply<Half, 64>;
FASTATTN_DEVICE void multiply_boxes(float (&d)[32], uint32_t a, uint32_t b, bool accumulate FASTATTN_WHERE) {
  Product::shared<0, 0>(d, operand(a), operand(b), accumulate FASTATTN_HERE);
}
FASTATTN_DEVICE void output_all(const Params& p, const float (&d)[32] FASTATTN_WHERE) {
  float sum = 0;
  for (const float x : d) sum += x;
  output(p, 0, thread_index(), sum FASTATTN_HERE);
}

// ---- mbarriers

FASTATTN_DEVICE void barrier_nobody_completes(const Params&) {
  init_barriers(2);
  if (thread_index() == 0) mbarrier_arrive(barrier_at(0));
  mbarrier_wait(barrier_at(0), 0);
}
FASTATTN_DEVICE void polled_barrier_nobody_completes(const Params&) {
  init_barriers(2);
  while (!mbarrier_try_wait(barrier_at(1), 0)) {
  }
}
// The second phase is waited for as if it had the parity of the first: the wait does not wait.
FASTATTN_DEVICE void stale_parity(const Params& p) {
  init_barriers(1);
  for (uint32_t round = 0; round < 2; ++round) {
    sync_block();
    if (thread_index() == 0) {
      mbarrier_arrive_expect(barrier_at(0), kBoxBytes);
      fence_async_shared();
      load_box(p, round, 0);
    }
    mbarrier_wait(barrier_at(0), 0);
    output(p, 0, thread_index(), first_of(round));
  }
}
FASTATTN_DEVICE void parity_of_the_next_phase(const Params&) {
  init_barriers(1);
  if (thread_index() == 0) mbarrier_arrive(barrier_at(0));
  mbarrier_wait(barrier_at(0), 0);
  mbarrier_wait(barrier_at(0), 1);
}
FASTATTN_DEVICE void too_few_bytes_announced(const Params& p) {
  init_barriers(1);
  if (thread_index() == 0) {
    mbarrier_arrive_expect(barrier_at(0), kBoxBytes - 64);
    load_box(p, 0, 0);
  }
  mbarrier_wait(barrier_at(0), 0);
}
FASTATTN_DEVICE void too_many_bytes_announced(const Params& p) {
  init_barriers(1);
  if (thread_index() == 0) {
    mbarrier_arrive_expect(barrier_at(0), kBoxBytes + 64);
    load_box(p, 0, 0);
  }
  mbarrier_wait(barrier_at(0), 0);
}
FASTATTN_DEVICE void bytes_never_announced(const Params& p) {
  init_barriers(2);
  if (thread_index() == 0) load_box(p, 0, 0);
}
FASTATTN_DEVICE void one_arrival_too_many(const Params&) {
  init_barriers(2);
  mbarrier_expect(barrier_at(0), 16);
  if (thread_index() < 3) mbarrier_arrive(barrier_at(0));
}
FASTATTN_DEVICE void barrier_without_init(const Params&) { mbarrier_arrive(barrier_at(0)); }
FASTATTN_DEVICE void barrier_initialised_twice(const Params&) {
  mbarrier_init(barrier_at(0) + 8 * static_cast<uint32_t>(thread_index() / 2), 1);
}
FASTATTN_DEVICE void misaligned_mbarrier(const Params&) { mbarrier_init(barrier_at(0) + 4, 1); }
FASTATTN_DEVICE void barrier_not_yet_shown(const Params&) {
  if (thread_index() == 0) mbarrier_init(barrier_at(0), 64);
  mbarrier_arrive(barrier_at(0));
}
FASTATTN_DEVICE void store_over_mbarrier(const Params&) {
  init_barriers(1);
  store_shared(barrier_at(1), 0);
}
FASTATTN_DEVICE void missing_init_fence(const Params& p) {
  if (thread_index() == 0) {
    mbarrier_init(barrier_at(0), 1);
    mbarrier_arrive_expect(barrier_at(0), kBoxBytes);
    load_box(p, 0, 0);
  }
}
// An arrival tells the others of what its thread did, and of nothing that other lanes did.
FASTATTN_DEVICE void arrival_without_sync_warp(const Params& p) {
  init_barriers(1);
  store_shared(box_at(0) + 4 * static_cast<uint32_t>(thread_index()), 1.0f);
  if (thread_index() == 0) mbarrier_arrive(barrier_at(0));
  mbarrier_wait(barrier_at(0), 0);
  output(p, 0, thread_index(), load_shared<float>(box_at(0) + 4 * static_cast<uint32_t>(thread_index() ^ 1)));
}

// ---- Tensor copies

FASTATTN_DEVICE void load_not_waited_for(const Params& p) {
  init_barriers(1);
  if (thread_index() == 0) {
    mbarrier_arrive_expect(barrier_at(0), kBoxBytes);
    load_box(p, 0, 0);
  }
  sync_block();
  output(p, 0, thread_index(), first_of(0));
}
FASTATTN_DEVICE void wait_for_another_load(const Params& p) {
  init_barriers(1);
  if (thread_index() == 0) {
    for (uint32_t i = 0; i < 2; ++i) {
      mbarrier_arrive_expect(barrier_at(i), kBoxBytes);
      load_box(p, i, i);
    }
  }
  mbarrier_wait(barrier_at(0), 0);
  output(p, 0, thread_index(), first_of(1));
}
// The data has come; the thread that reads it has not looked.
FASTATTN_DEVICE void another_thread_waited(const Params& p) {
  init_barriers(1);
  if (thread_index() == 0) {
    mbarrier_arrive_expect(barrier_at(0), kBoxBytes);
    load_box(p, 0, 0);
  }
  if (thread_index() == 0) mbarrier_wait(barrier_at(0), 0);
  any_lane(true);
  output(p, 0, thread_index(), first_of(0));
}
FASTATTN_DEVICE void load_into_what_is_read(const Params& p) {
  init_barriers(1);
  for (uint32_t round = 0; round < 2; ++round) {
    bring_box(p, 0, 0, round);
    output(p, 0, thread_index(), first_of(0));
  }
}
FASTATTN_DEVICE void two_loads_to_one_place(const Params& p) {
  init_barriers(1);
  if (thread_index() == 0) {
    mbarrier_arrive_expect(barrier_at(0), 2 * kBoxBytes);
    load_box(p, 0, 0);
    load_box(p, 0, 0);
  }
  mbarrier_wait(barrier_at(0), 0);
}
FASTATTN_DEVICE void load_over_unfenced_stores(const Params& p) {
  init_barriers(1);
  write_box(0);
  sync_block();
  bring_box(p, 0, 0, 0);
}
FASTATTN_DEVICE void load_still_under_way(const Params& p) {
  init_barriers(1);
  if (thread_index() == 0) {
    mbarrier_arrive_expect(barrier_at(0), kBoxBytes);
    load_box(p, 0, 0);
  }
}
FASTATTN_DEVICE void misaligned_tensor_load(const Params& p) {
  init_barriers(1);
  if (thread_index() == 0) {
    mbarrier_arrive_expect(barrier_at(0), kBoxBytes);
    tensor_load_2d(box_at(0) + 64, &p.maps[0], barrier_at(0), 0, 0, CachePolicy::kNormal);
  }
}
FASTATTN_DEVICE void tensor_load_behind_shared(const Params& p) {
  init_barriers(1);
  if (thread_index() == 0) {
    mbarrier_arrive_expect(barrier_at(0), kBoxBytes);
    tensor_load_2d(box_at(3) - 128, &p.maps[0], barrier_at(0), 0, 0, CachePolicy::kNormal);
  }
}
FASTATTN_DEVICE void tensor_load_of_another_rank(const Params& p) {
  init_barriers(1);
  if (thread_index() == 0) tensor_load_3d(box_at(0), &p.maps[0], barrier_at(0), 0, 0, 0, CachePolicy::kNormal);
}
FASTATTN_DEVICE void tensor_load_without_map(const Params& p) {
  init_barriers(1);
  if (thread_index() == 0) tensor_load_2d(box_at(0), &p.maps[1], barrier_at(0), 0, 0, CachePolicy::kNormal);
}
FASTATTN_DEVICE void tensor_store_to_input(const Params& p) {
  write_box(0);
  fence_async_shared();
  sync_block();
  if (thread_index() == 0) tensor_store_2d(&p.maps[0], box_at(0), 0, 0);
}

// Stores to global memory: 1 KB of out0.
FASTATTN_DEVICE void add_to_output(const Params& p FASTATTN_WHERE) {
  bulk_reduce_add(static_cast<float*>(p.out[0]), box_at(0), 1024 FASTATTN_HERE);
}
FASTATTN_DEVICE void store_without_proxy_fence(const Params& p) {
  write_box(0);
  sync_block();
  if (thread_index() == 0) add_to_output(p);
}
// One thread's fence covers what it knows: not what others write before the barrier that comes later.
FASTATTN_DEVICE void proxy_fence_before_barrier(const Params& p) {
  write_box(0);
  if (thread_index() == 0) fence_async_shared();
  sync_block();
  if (thread_index() == 0) add_to_output(p);
}
FASTATTN_DEVICE void store_without_barrier(const Params& p) {
  write_box(0);
  fence_async_shared();
  if (thread_index() == 63) add_to_output(p);
}
FASTATTN_DEVICE void source_overwritten(const Params& p) {
  write_box(0);
  fence_async_shared();
  sync_block();
  if (thread_index() == 0) {
    add_to_output(p);
    bulk_commit();
  }
  sync_block();
  write_box(0);
}
FASTATTN_DEVICE void source_overwritten_after_older_group(const Params& p) {
  write_box(0);
  fence_async_shared();
  sync_block();
  if (thread_index() == 0) {
    for (int i = 0; i < 2; ++i) {
      add_to_output(p);
      bulk_commit();
    }
    bulk_wait_read<1>();
  }
  sync_block();
  write_box(0);
}
// The thread that stored has waited; the others are not told.
FASTATTN_DEVICE void source_overwritten_without_barrier(const Params& p) {
  write_box(0);
  fence_async_shared();
  sync_block();
  if (thread_index() == 0) {
    add_to_output(p);
    bulk_commit();
    bulk_wait_read<0>();
  }
  write_box(0);
}
FASTATTN_DEVICE void exit_before_source_is_read(const Params& p) {
  write_box(0);
  fence_async_shared();
  sync_block();
  if (thread_index() == 0) {
    add_to_output(p);
    bulk_commit();
  }
}
FASTATTN_DEVICE void store_not_committed(const Params& p) {
  write_box(0);
  fence_async_shared();
  sync_block();
  if (thread_index() == 0) {
    add_to_output(p);
    bulk_wait_read<0>();
  }
}
FASTATTN_DEVICE void odd_bulk_load(const Params& p) {
  init_barriers(1);
  if (thread_index() == 0) bulk_load(box_at(0), p.in[0], 24, barrier_at(0));
}

// ---- Products: 128 or 256 threads

FASTATTN_DEVICE void missing_warpgroup_fence(const Params& p) {
  init_barriers(1);
  bring_box(p, 0, 0, 0);
  float d[32];
  multiply_boxes(d, 0, 0, false);
  warpgroup_commit();
  warpgroup_wait<0>();
  output_all(p, d);
}
FASTATTN_DEVICE void fence_missing_after_wait(const Params& p) {
  init_barriers(1);
  bring_box(p, 0, 0, 0);
  float d[32];
  warpgroup_fence();
  for (int i = 0; i < 2; ++i) {
    multiply_boxes(d, 0, 0, i > 0);
    warpgroup_commit();
    warpgroup_wait<0>();
    for (float& x : d) x *= 2;
  }
  output_all(p, d);
}
FASTATTN_DEVICE void accumulator_scaled_after_fence(const Params& p) {
  init_barriers(1);
  bring_box(p, 0, 0, 0);
  float d[32];
  for (int i = 0; i < 2; ++i) {
    warpgroup_fence();
    if (i > 0) d[5] += 1;
    multiply_boxes(d, 0, 0, i > 0);
    warpgroup_commit();
    warpgroup_wait<0>();
  }
  output_all(p, d);
}
FASTATTN_DEVICE void operand_registers_after_fence(const Params& p) {
  init_barriers(1);
  bring_box(p, 0, 0, 0);
  float d[32];
  const uint32_t r[4] = {};
  warpgroup_fence();
  multiply_boxes(d, 0, 0, false);
  warpgroup_commit();
  warpgroup_wait<0>();
  Product::registers<0>(d, r, operand(0), true);
  warpgroup_commit();
  warpgroup_wait<0>();
  output_all(p, d);
}
FASTATTN_DEVICE void accumulator_read_before_wait(const Params& p) {
  init_barriers(1);
  bring_box(p, 0, 0, 0);
  float d[32];
  warpgroup_fence();
  multiply_boxes(d, 0, 0, false);
  warpgroup_commit();
  output_all(p, d);
  warpgroup_wait<0>();
}
FASTATTN_DEVICE void accumulator_packed_before_wait(const Params& p) {
  init_barriers(1);
  bring_box(p, 0, 0, 0);
  float d[32];
  warpgroup_fence();
  multiply_boxes(d, 0, 0, false);
  warpgroup_commit();
  const uint32_t pair = pack2<Half>(exp2_approx(d[0] * 0.5f - 1), d[1]);
  warpgroup_wait<0>();
  output(p, 0, thread_index(), pair);
}
FASTATTN_DEVICE void accumulator_packed_to_8_bits_before_wait(const Params& p) {
  init_barriers(1);
  bring_box(p, 0, 0, 0);
  float d[32];
  warpgroup_fence();
  WarpgroupMultiply<E4M3, 64>::shared<0, 0>(d, operand(0), operand(0), false);
  warpgroup_commit();
  const uint32_t four = pack4(0, d[0], d[1] * 256, 1);
  warpgroup_wait<0>();
  output(p, 0, thread_index(), four);
}
// What the transposition of 8-bit values does: the products see it after a fence, which one warp has not executed.
FASTATTN_DEVICE void transposed_without_proxy_fence(const Params& p) {
  init_barriers(1);
  bring_box(p, 0, 0, 0);
  uint32_t r[4];
  const uint32_t thread = static_cast<uint32_t>(thread_index());
  const uint32_t own = 128 * (thread / 32 * 16 + thread % 16) + (thread / 16 % 2 ^ thread % 8) * 16;
  load_matrix_x4_transposed(r, box_at(0) + own);
  store_matrix_x4(box_at(1) + own, r);
  if (warp_index() != 2) fence_async_shared();
  sync_block();
  float d[32];
  warpgroup_fence();
  WarpgroupMultiply<E4M3, 64>::shared<0, 0>(d, operand(1), operand(1), false);
  warpgroup_commit();
  warpgroup_wait<0>();
  output_all(p, d);
}
FASTATTN_DEVICE void wait_for_older_products(const Params& p) {
  init_barriers(1);
  bring_box(p, 0, 0, 0);
  float first[32], second[32];
  warpgroup_fence();
  multiply_boxes(first, 0, 0, false);
  warpgroup_commit();
  multiply_boxes(second, 0, 0, false);
  warpgroup_commit();
  warpgroup_wait<1>();
  output_all(p, first);
  output_all(p, second);
  warpgroup_wait<0>();
}
FASTATTN_DEVICE void products_not_committed(const Params& p) {
  init_barriers(1);
  bring_box(p, 0, 0, 0);
  float d[32];
  warpgroup_fence();
  multiply_boxes(d, 0, 0, false);
  warpgroup_wait<0>();
  output_all(p, d);
  warpgroup_commit();
  warpgroup_wait<0>();
}
FASTATTN_DEVICE void accumulator_written_before_wait(const Params& p) {
  init_barriers(1);
  bring_box(p, 0, 0, 0);
  float d[32];
  warpgroup_fence();
  multiply_boxes(d, 0, 0, false);
  warpgroup_commit();
  d[3] = 0;
  warpgroup_wait<0>();
  output_all(p, d);
}
FASTATTN_DEVICE void products_never_waited_for(const Params& p) {
  init_barriers(1);
  bring_box(p, 0, 0, 0);
  float d[32];
  warpgroup_fence();
  multiply_boxes(d, 0, 0, false);
  warpgroup_commit();
}
FASTATTN_DEVICE void operand_without_proxy_fence(const Params& p) {
  write_box(0);
  sync_block();
  float d[32];
  warpgroup_fence();
  multiply_boxes(d, 0, 0, false);
  warpgroup_commit();
  warpgroup_wait<0>();
  output_all(p, d);
}
FASTATTN_DEVICE void operand_without_barrier(const Params& p) {
  write_box(0);
  fence_async_shared();
  float d[32];
  warpgroup_fence();
  multiply_boxes(d, 0, 0, false);
  warpgroup_commit();
  warpgroup_wait<0>();
  output_all(p, d);
}
FASTATTN_DEVICE void operand_still_loading(const Params& p) {
  init_barriers(1);
  if (thread_index() == 0) {
    mbarrier_arrive_expect(barrier_at(0), kBoxBytes);
    load_box(p, 0, 0);
  }
  float d[32];
  warpgroup_fence();
  multiply_boxes(d, 0, 0, false);
  warpgroup_commit();
  warpgroup_wait<0>();
  output_all(p, d);
}
FASTATTN_DEVICE void operand_never_written(const Params& p) {
  init_barriers(1);
  bring_box(p, 0, 0, 0);
  float d[32];
  warpgroup_fence();
  multiply_boxes(d, 0, 1, false);
  warpgroup_commit();
  warpgroup_wait<0>();
  output_all(p, d);
}
FASTATTN_DEVICE void operand_behind_shared(const Params& p) {
  init_barriers(1);
  bring_box(p, 0, 0, 0);
  float d[32];
  warpgroup_fence();
  multiply_boxes(d, 0, 4, false);
  warpgroup_commit();
  warpgroup_wait<0>();
  output_all(p, d);
}
FASTATTN_DEVICE void operand_overwritten(const Params& p) {
  init_barriers(1);
  bring_box(p, 0, 0, 0);
  float d[32];
  warpgroup_fence();
  multiply_boxes(d, 0, 0, false);
  warpgroup_commit();
  write_box(0);
  warpgroup_wait<0>();
  output_all(p, d);
}
FASTATTN_DEVICE void operand_overwritten_by_another_warp(const Params& p) {
  init_barriers(1);
  bring_box(p, 0, 0, 0);
  float d[32];
  warpgroup_fence();
  multiply_boxes(d, 0, 0, false);
  warpgroup_commit();
  warpgroup_wait<0>();
  write_box(0);  // other warps of the group may be behind
  output_all(p, d);
}
// Two warpgroups: the second one brings the box again when the first one says it is done, which is too early.
FASTATTN_DEVICE void stage_released_before_wait(const Params& p) {
  init_barriers(4);
  if (warp_index() >= 4) {
    if (warp_index() == 4 && elect_one()) {
      for (uint32_t round = 0; round < 2; ++round) {
        if (round > 0) mbarrier_wait(barrier_at(1), 0);
        for (int i = 0; i < 3; ++i) mbarrier_arrive(barrier_at(0));
        mbarrier_arrive_expect(barrier_at(0), kBoxBytes);
        load_box(p, 0, 0);
      }
    }
    return;
  }
  float d[32];
  for (uint32_t round = 0; round < 2; ++round) {
    mbarrier_wait(barrier_at(0), round);
    warpgroup_fence();
    multiply_boxes(d, 0, 0, round > 0);
    warpgroup_commit();
    if (p.n[0] != 0) warpgroup_wait<0>();
    if (lane_index() == 0) mbarrier_arrive(barrier_at(1));
    if (round == 1) warpgroup_wait<0>();
  }
  output_all(p, d);
}
// One warp of the four says so for all.
FASTATTN_DEVICE void stage_released_by_one_warp(const Params& p) {
  init_barriers(1);
  if (warp_index() >= 4) {
    if (warp_index() == 4 && elect_one()) {
      for (uint32_t round = 0; round < 2; ++round) {
        if (round > 0) mbarrier_wait(barrier_at(1), 0);
        mbarrier_arrive_expect(barrier_at(0), kBoxBytes);
        load_box(p, 0, 0);
      }
    }
    return;
  }
  float d[32];
  for (uint32_t round = 0; round < 2; ++round) {
    mbarrier_wait(barrier_at(0), round);
    warpgroup_fence();
    multiply_boxes(d, 0, 0, round > 0);
    warpgroup_commit();
    warpgroup_wait<0>();
    if (thread_index() == 0) mbarrier_arrive(barrier_at(1));
  }
  output_all(p, d);
}
FASTATTN_DEVICE void product_of_three_warps(const Params& p) {
  init_barriers(1);
  bring_box(p, 0, 0, 0);
  float d[32];
  if (warp_index() == 3) return;
  warpgroup_fence();
  multiply_boxes(d, 0, 0, false);
  warpgroup_commit();
  warpgroup_wait<0>();
}
FASTATTN_DEVICE void warps_at_different_products(const Params& p) {
  init_barriers(1);
  bring_box(p, 0, 0, 0);
  float d[32];
  warpgroup_fence();
  if (warp_index() == 2) {
    multiply_boxes(d, 0, 0, false);
  } else {
    Product::shared<0, 1>(d, operand(0), operand(0), false);
  }
  warpgroup_commit();
  warpgroup_wait<0>();
}
FASTATTN_DEVICE void different_descriptors(const Params& p) {
  init_barriers(1);
  bring_box(p, 0, 0, 0);
  float d[32];
  warpgroup_fence();
  Product::shared<0, 0>(d, operand(0) + static_cast<uint64_t>(warp_index()), operand(0), false);
  warpgroup_commit();
  warpgroup_wait<0>();
}
FASTATTN_DEVICE void overlapping_accumulators(const Params& p) {
  init_barriers(1);
  bring_box(p, 0, 0, 0);
  float d[32];
  warpgroup_fence();
  multiply_boxes(d, 0, 0, false);
  auto& half = reinterpret_cast<float (&)[16]>(d[16]);
  WarpgroupMultiply<Half, 32>::shared<0, 0>(half, operand(0), operand(0), true);
  warpgroup_commit();
  warpgroup_wait<0>();
}

// ---- Registers: 384 threads begin with 168 each

FASTATTN_DEVICE void registers_never_given(const Params&) {
  if (warp_index() >= 4) registers_increase<240>();
}
FASTATTN_DEVICE void too_few_registers_given(const Params&) {
  if (warp_index() < 4) {
    registers_decrease<40>();
  } else {
    registers_increase<240>();
  }
}
FASTATTN_DEVICE void decrease_to_more_registers(const Params&) { registers_decrease<200>(); }
FASTATTN_DEVICE void increase_to_fewer_registers(const Params&) {
  if (warp_index() >= 8) {
    registers_decrease<24>();
  } else {
    registers_increase<240>();
    registers_increase<200>();
  }
}
FASTATTN_DEVICE void registers_of_one_warp(const Params&) {
  if (warp_index() == 0) registers_decrease<24>();
}

#define FASTATTN_HOPPER_PLANTED_BUGS(X)                                                        \
  X(barrier_nobody_completes, (barrier_nobody_completes), 64)                                  \
  X(polled_barrier_nobody_completes, (polled_barrier_nobody_completes), 64)                    \
  X(stale_parity, (stale_parity), 64)                                                          \
  X(parity_of_the_next_phase, (parity_of_the_next_phase), 64)                                  \
  X(too_few_bytes_announced, (too_few_bytes_announced), 64)                                    \
  X(too_many_bytes_announced, (too_many_bytes_announced), 64)                                  \
  X(bytes_never_announced, (bytes_never_announced), 64)                                        \
  X(one_arrival_too_many, (one_arrival_too_many), 64)                                          \
  X(barrier_without_init, (barrier_without_init), 64)                                          \
  X(barrier_initialised_twice, (barrier_initialised_twice), 64)                                \
  X(misaligned_mbarrier, (misaligned_mbarrier), 64)                                            \
  X(barrier_not_yet_shown, (barrier_not_yet_shown), 64)                                        \
  X(store_over_mbarrier, (store_over_mbarrier), 64)                                            \
  X(missing_init_fence, (missing_init_fence), 64)                                              \
  X(arrival_without_sync_warp, (arrival_without_sync_warp), 64)                                \
  X(load_not_waited_for, (load_not_waited_for), 64)                                            \
  X(wait_for_another_load, (wait_for_another_load), 64)                                        \
  X(another_thread_waited, (another_thread_waited), 32)                                        \
  X(load_into_what_is_read, (load_into_what_is_read), 64)                                      \
  X(two_loads_to_one_place, (two_loads_to_one_place), 64)                                      \
  X(load_over_unfenced_stores, (load_over_unfenced_stores), 64)                                \
  X(load_still_under_way, (load_still_under_way), 64)                                          \
  X(misaligned_tensor_load, (misaligned_tensor_load), 64)                                      \
  X(tensor_load_behind_shared, (tensor_load_behind_shared), 64)                                \
  X(tensor_load_of_another_rank, (tensor_load_of_another_rank), 64)                            \
  X(tensor_load_without_map, (tensor_load_without_map), 64)                                    \
  X(tensor_store_to_input, (tensor_store_to_input), 64)                                        \
  X(store_without_proxy_fence, (store_without_proxy_fence), 64)                                \
  X(proxy_fence_before_barrier, (proxy_fence_before_barrier), 64)                              \
  X(store_without_barrier, (store_without_barrier), 64)                                        \
  X(source_overwritten, (source_overwritten), 64)                                              \
  X(source_overwritten_after_older_group, (source_overwritten_after_older_group), 64)          \
  X(source_overwritten_without_barrier, (source_overwritten_without_barrier), 64)              \
  X(exit_before_source_is_read, (exit_before_source_is_read), 64)                              \
  X(store_not_committed, (store_not_committed), 64)                                            \
  X(odd_bulk_load, (odd_bulk_load), 64)                                                        \
  X(missing_warpgroup_fence, (missing_warpgroup_fence), 128)                                   \
  X(fence_missing_after_wait, (fence_missing_after_wait), 128)                                 \
  X(accumulator_scaled_after_fence, (accumulator_scaled_after_fence), 128)                     \
  X(operand_registers_after_fence, (operand_registers_after_fence), 128)                       \
  X(accumulator_read_before_wait, (accumulator_read_before_wait), 128)                         \
  X(accumulator_packed_before_wait, (accumulator_packed_before_wait), 128)                     \
  X(accumulator_packed_to_8_bits_before_wait, (accumulator_packed_to_8_bits_before_wait), 128) \
  X(transposed_without_proxy_fence, (transposed_without_proxy_fence), 128)                     \
  X(wait_for_older_products, (wait_for_older_products), 128)                                   \
  X(products_not_committed, (products_not_committed), 128)                                     \
  X(accumulator_written_before_wait, (accumulator_written_before_wait), 128)                   \
  X(products_never_waited_for, (products_never_waited_for), 128)                               \
  X(operand_without_proxy_fence, (operand_without_proxy_fence), 128)                           \
  X(operand_without_barrier, (operand_without_barrier), 128)                                   \
  X(operand_still_loading, (operand_still_loading), 128)                                       \
  X(operand_never_written, (operand_never_written), 128)                                       \
  X(operand_behind_shared, (operand_behind_shared), 128)                                       \
  X(operand_overwritten, (operand_overwritten), 128)                                           \
  X(operand_overwritten_by_another_warp, (operand_overwritten_by_another_warp), 128)           \
  X(stage_released_before_wait, (stage_released_before_wait), 256)                             \
  X(stage_released_by_one_warp, (stage_released_by_one_warp), 256)                             \
  X(product_of_three_warps, (product_of_three_warps), 128)                                     \
  X(warps_at_different_products, (warps_at_different_products), 128)                           \
  X(different_descriptors, (different_descriptors), 128)                                       \
  X(overlapping_accumulators, (overlapping_accumulators), 128)                                 \
  X(registers_never_given, (registers_never_given), 384)                                       \
  X(too_few_registers_given, (too_few_registers_given), 384)                                   \
  X(decrease_to_more_registers, (decrease_to_more_registers), 384)                             \
  X(increase_to_fewer_registers, (increase_to_fewer_registers), 384)                           \
  X(registers_of_one_warp, (registers_of_one_warp), 384)

}  // namespace fastattn::cuda::instruction_tests
