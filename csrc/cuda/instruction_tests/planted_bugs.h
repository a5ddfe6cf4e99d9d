// Kernels with one bug each, which the simulator must find.  They are never started on a GPU.
#pragma once

#include "kernels.h"

namespace fastattn::cuda::instruction_tests {

FASTATTN_DEVICE SharedAddress word(int index) { return shared_base() + 4 * static_cast<uint32_t>(index); }

FASTATTN_DEVICE void missing_barrier(const Params& p) {
  store_shared(word(thread_index()), thread_index());
  output(p, 0, thread_index(), load_shared<int>(word(block_threads() - 1 - thread_index())));
}

// The second round's stores come before the first round's loads of other warps.
FASTATTN_DEVICE void missing_second_barrier(const Params& p) {
  for (int round = 0; round < 2; ++round) {
    store_shared(word(thread_index()), thread_index() + round);
    sync_block();
    output(p, 0, thread_index(), load_shared<int>(word(block_threads() - 1 - thread_index())));
  }
}

FASTATTN_DEVICE void missing_sync_warp(const Params& p) {
  store_shared(word(lane_index()), lane_index());
  output(p, 0, lane_index(), load_shared<int>(word(lane_index() ^ 1)));
}

// Shuffles do not order memory.
FASTATTN_DEVICE void shuffle_for_sync_warp(const Params& p) {
  store_shared(word(lane_index()), lane_index());
  const int other = shuffle_xor(lane_index(), 1);
  output(p, 0, lane_index(), load_shared<int>(word(other)));
}

FASTATTN_DEVICE void missing_sync_before_load_matrix(const Params& p) {
  store_shared(shared_base() + 16 * static_cast<uint32_t>(lane_index()), Vec4{});
  uint32_t r[4];
  load_matrix_x4(r, shared_base() + 16 * static_cast<uint32_t>(lane_index()));
  output(p, 0, lane_index(), r[0]);
}

FASTATTN_DEVICE void missing_wait(const Params& p) {
  copy_async_16(shared_base() + 16 * static_cast<uint32_t>(thread_index()),
                static_cast<const Vec4*>(p.in[0]) + thread_index(), true);
  copy_async_commit();
  sync_block();
  output(p, 0, thread_index(), load_shared<Vec4>(shared_base() + 16 * static_cast<uint32_t>(thread_index())));
}

// The group that is waited for is not the one that is read.
FASTATTN_DEVICE void wait_for_older_group(const Params& p) {
  for (uint32_t stage = 0; stage < 2; ++stage) {
    copy_async_16(shared_base() + 1024 * stage + 16 * static_cast<uint32_t>(thread_index()),
                  static_cast<const Vec4*>(p.in[0]) + thread_index(), true);
    copy_async_commit();
  }
  copy_async_wait<1>();
  sync_block();
  output(p, 0, thread_index(), load_shared<Vec4>(shared_base() + 1024 + 16 * static_cast<uint32_t>(thread_index())));
}

FASTATTN_DEVICE void missing_commit(const Params& p) {
  copy_async_16(shared_base() + 16 * static_cast<uint32_t>(thread_index()),
                static_cast<const Vec4*>(p.in[0]) + thread_index(), true);
  copy_async_wait<0>();
  sync_block();
  output(p, 0, thread_index(), load_shared<Vec4>(shared_base() + 16 * static_cast<uint32_t>(thread_index())));
}

// Waited for by the thread that issued it, read by another without a barrier between.
FASTATTN_DEVICE void missing_barrier_after_wait(const Params& p) {
  copy_async_16(shared_base() + 16 * static_cast<uint32_t>(thread_index()),
                static_cast<const Vec4*>(p.in[0]) + thread_index(), true);
  copy_async_commit();
  sync_block();
  copy_async_wait<0>();
  sync_warp();
  output(p, 0, thread_index(),
         load_shared<Vec4>(shared_base() + 16 * static_cast<uint32_t>(block_threads() - 1 - thread_index())));
}

// The next copy begins while other warps may still read the stage.
FASTATTN_DEVICE void refill_before_barrier(const Params& p) {
  const SharedAddress mine = shared_base() + 16 * static_cast<uint32_t>(thread_index());
  for (int round = 0; round < 2; ++round) {
    copy_async_16(mine, static_cast<const Vec4*>(p.in[0]) + thread_index(), true);
    copy_async_commit();
    copy_async_wait<0>();
    sync_block();
    uint32_t r[4];
    load_matrix_x4(r, shared_base() + 16 * static_cast<uint32_t>(lane_index()));
    output(p, 0, thread_index(), r[0]);
  }
}

FASTATTN_DEVICE void store_behind_shared(const Params&) { store_shared(word(thread_index() + 1), 1); }
FASTATTN_DEVICE void store_before_shared(const Params&) { store_shared(word(thread_index() - 1), 1); }
FASTATTN_DEVICE void unset_shared_address(const Params&) { store_shared(4 * static_cast<uint32_t>(thread_index()), 1); }
FASTATTN_DEVICE void store_behind_global(const Params& p) { output(p, 0, thread_index() + 1, 1); }
FASTATTN_DEVICE void load_before_global(const Params& p) {
  output(p, 0, thread_index(), input<int>(p, 0, thread_index() - 1));
}
FASTATTN_DEVICE void copy_behind_global(const Params& p) {
  copy_async_16(shared_base() + 16 * static_cast<uint32_t>(thread_index()),
                static_cast<const Vec4*>(p.in[0]) + thread_index() + 1, true);
}
FASTATTN_DEVICE void store_to_input(const Params& p) {
  store_global(const_cast<int*>(static_cast<const int*>(p.in[0])) + thread_index(), 1);
}
FASTATTN_DEVICE void atomic_to_input(const Params& p) {
  atomic_add(const_cast<int*>(static_cast<const int*>(p.in[0])) + thread_index(), 1);
}

FASTATTN_DEVICE void misaligned_shared(const Params&) {
  store_shared(shared_base() + 4 * static_cast<uint32_t>(thread_index()), Vec2{});
}
FASTATTN_DEVICE void misaligned_global(const Params& p) {
  const auto* at = static_cast<const uint32_t*>(p.in[0]) + thread_index();
  output(p, 0, thread_index(), load_constant(reinterpret_cast<const Vec2*>(at)).x[0]);
}
FASTATTN_DEVICE void misaligned_load_matrix(const Params& p) {
  for (uint32_t i = 0; i < 8; ++i) store_shared(word(static_cast<int>(i) * 32 + lane_index()), 0);
  sync_warp();
  uint32_t r[4];
  load_matrix_x4(r, shared_base() + 8 * static_cast<uint32_t>(lane_index()));
  output(p, 0, lane_index(), r[0]);
}
FASTATTN_DEVICE void misaligned_copy(const Params& p) {
  copy_async_16(shared_base() + 16 * static_cast<uint32_t>(thread_index()),
                static_cast<const uint32_t*>(p.in[0]) + thread_index(), true);
}

// Blocks have no order, whatever the order of a run.
FASTATTN_DEVICE void blocks_store_the_same(const Params& p) { output(p, 0, thread_index(), 1); }
FASTATTN_DEVICE void blocks_add_without_atomics(const Params& p) {
  if (block_index() != thread_index()) return;
  int* total = static_cast<int*>(p.out[0]);
  store_global(total, load_global(total) + 1);
}
FASTATTN_DEVICE void block_reads_another(const Params& p) {
  const auto* mine = static_cast<const int*>(p.out[0]);
  if (block_index() == 0) output(p, 0, thread_index(), 1);
  if (block_index() == 1) output(p, 0, 64 + thread_index(), load_global(mine + thread_index()));
}
FASTATTN_DEVICE void block_writes_what_another_read(const Params& p) {
  const auto* mine = static_cast<const int*>(p.out[0]);
  if (block_index() == 0) output(p, 0, 64 + thread_index(), load_global(mine + thread_index()));
  if (block_index() == 1) output(p, 0, thread_index(), 1);
}
FASTATTN_DEVICE void store_beside_atomics(const Params& p) {
  int* total = static_cast<int*>(p.out[0]);
  if (block_index() != 1) {
    atomic_add(total, 1);
  } else if (thread_index() == 0) {
    store_global(total, 0);
  }
}
FASTATTN_DEVICE void missing_barrier_in_global(const Params& p) {
  output(p, 0, thread_index(), 1);
  const auto* mine = static_cast<const int*>(p.out[0]);
  output(p, 0, 64 + thread_index(), load_global(mine + (thread_index() ^ 1)));
}

FASTATTN_DEVICE void divergent_shuffle(const Params& p) {
  int value = lane_index();
  if (lane_index() < 16) value = shuffle_xor(value, 1);
  sync_warp();
  output(p, 0, lane_index(), value);
}
FASTATTN_DEVICE void divergent_multiply(const Params& p) {
  float d[4] = {};
  const uint32_t a[4] = {};
  if (lane_index() != 7) multiply_m16n8k16<Half>(d, a, 0, 0);
  output(p, 0, lane_index(), d[0]);
}
FASTATTN_DEVICE void divergent_barrier(const Params&) {
  if (lane_index() < 16) {
    sync_block();
  } else {
    sync_block();
  }
}
FASTATTN_DEVICE void exit_before_barrier(const Params&) {
  if (thread_index() >= 64) return;
  sync_block();
}
FASTATTN_DEVICE void deadlocked_barriers(const Params&) {
  if (warp_index() == 0) {
    named_barrier_sync(1, 64);
    named_barrier_sync(2, 64);
  } else {
    named_barrier_sync(2, 64);
    named_barrier_sync(1, 64);
  }
}
FASTATTN_DEVICE void barrier_for_different_counts(const Params&) { named_barrier_sync(1, warp_index() == 0 ? 64 : 32); }
FASTATTN_DEVICE void barrier_for_half_a_warp(const Params&) { named_barrier_sync(1, 16); }
FASTATTN_DEVICE void barrier_number_16(const Params&) { named_barrier_sync(16, 64); }

FASTATTN_DEVICE void uninitialised_shared(const Params& p) {
  if (thread_index() != 5) store_shared(word(thread_index()), 1);
  sync_block();
  output(p, 0, thread_index(), load_shared<int>(word(thread_index())));
}
FASTATTN_DEVICE void uninitialised_matrix_row(const Params& p) {
  if (lane_index() != 9) store_shared(shared_base() + 16 * static_cast<uint32_t>(lane_index()), Vec4{});
  sync_warp();
  uint32_t r[4];
  load_matrix_x4(r, shared_base() + 16 * static_cast<uint32_t>(lane_index()));
  output(p, 0, lane_index(), r[0]);
}
// Not an error by itself; the number must be a strange one.
FASTATTN_DEVICE void uninitialised_register(const Params& p) {
  uint32_t values[4];
  if (p.n[0] == 1) values[2] = 1;
  output(p, 0, thread_index(), values[p.n[1]]);
}

}  // namespace fastattn::cuda::instruction_tests
