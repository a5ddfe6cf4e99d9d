// One small kernel for each instruction of the layer: what the simulator is tested with, and what it is compared with a
// GPU by.  Every kernel takes arrays that a test fills and reads, in the layout of the registers: the tests write the
// manual's layouts down on their own.
#pragma once

#include "../arch/arch.h"
#include "../arch/hopper.h"
#include "run.h"

namespace fastattn::cuda::instruction_tests {

template <class V>
FASTATTN_DEVICE V input(const Params& p, int array, int index FASTATTN_WHERE) {
  return load_constant(static_cast<const V*>(p.in[array]) + index FASTATTN_HERE);
}
template <class V>
FASTATTN_DEVICE void output(const Params& p, int array, int index, V value FASTATTN_WHERE) {
  store_global(static_cast<V*>(p.out[array]) + index, value FASTATTN_HERE);
}

// out0[block][thread][8]
FASTATTN_DEVICE void positions(const Params& p) {
  const int block = (block_index_z() * grid_size_y() + block_index_y()) * grid_size() + block_index(),
            at = block * block_threads();
  const int values[8] = {thread_index(), lane_index(),    warp_index(),    block_threads(),
                         block_index(),  block_index_y(), block_index_z(), grid_size()};
  for (int i = 0; i < 8; ++i) output(p, 0, (at + thread_index()) * 8 + i, values[i]);
}

// in0 float[2 n0] -> out0 pairs, out1 the single conversions
template <class T>
FASTATTN_DEVICE void pack(const Params& p) {
  for (int i = thread_index(); i < p.n[0]; i += block_threads()) {
    const float low = input<float>(p, 0, 2 * i), high = input<float>(p, 0, 2 * i + 1);
    output(p, 0, i, pack2<T>(low, high));
    output(p, 1, 2 * i, pack1<T>(low));
    output(p, 1, 2 * i + 1, pack1<T>(high));
  }
}

// in0 uint32[n0] -> out0 float[2 n0], out1 the same one by one
template <class T>
FASTATTN_DEVICE void unpack(const Params& p) {
  for (int i = thread_index(); i < p.n[0]; i += block_threads()) {
    const uint32_t pair = input<uint32_t>(p, 0, i);
    float low, high;
    unpack2<T>(pair, low, high);
    output(p, 0, 2 * i, low);
    output(p, 0, 2 * i + 1, high);
    output(p, 1, 2 * i, unpack1<T>(static_cast<uint16_t>(pair)));
    output(p, 1, 2 * i + 1, unpack1<T>(static_cast<uint16_t>(pair >> 16)));
  }
}

// in0 float[n0] -> out0 exp2, out1 log2, out2 1/x
FASTATTN_DEVICE void functions(const Params& p) {
  for (int i = thread_index(); i < p.n[0]; i += block_threads()) {
    const float x = input<float>(p, 0, i);
    output(p, 0, i, exp2_approx(x));
    output(p, 1, i, log2_approx(x));
    output(p, 2, i, reciprocal_approx(x));
  }
  if (thread_index() == 0) {
    output(p, 3, 0, infinity());
    output(p, 3, 1, not_a_number());
    output(p, 3, 2, float_of(bits_of(-2.5f)));
  }
}

// in0 uint32[32], in1 int[32] -> out0 uint32[4][32]
FASTATTN_DEVICE void shuffles(const Params& p) {
  const int lane = lane_index();
  const uint32_t value = input<uint32_t>(p, 0, lane);
  const int argument = input<int>(p, 1, lane);
  output(p, 0, lane, shuffle(value, argument));
  output(p, 0, 32 + lane, shuffle_xor(value, p.n[0]));
  output(p, 0, 64 + lane, shuffle_up(value, p.n[0]));
  output(p, 0, 96 + lane, shuffle_down(value, p.n[0]));
  output(p, 1, lane, shuffle_xor(static_cast<float>(lane), 1));
  output(p, 2, lane, shuffle(-lane, 5));
}

// in0 int[64], two warps -> out0 uint32[64][5]
FASTATTN_DEVICE void votes(const Params& p) {
  const int thread = thread_index();
  const bool predicate = input<int>(p, 0, thread) != 0;
  output(p, 0, thread * 5, ballot(predicate));
  output(p, 0, thread * 5 + 1, uint32_t{any_lane(predicate)});
  output(p, 0, thread * 5 + 2, uint32_t{all_lanes(predicate)});
  output(p, 0, thread * 5 + 3, uint32_t{sync_block_or(predicate)});
  output(p, 0, thread * 5 + 4, static_cast<uint32_t>(sync_block_count(predicate)));
}

// V by V through shared memory, in0 -> out0, reversed within the block
template <class V>
FASTATTN_DEVICE void copy_units(const Params& p) {
  const SharedAddress base = shared_base();
  const int thread = thread_index(), mirrored = block_threads() - 1 - thread;
  const V value = p.n[0] ? load_global(static_cast<const V*>(p.in[0]) + thread) : input<V>(p, 0, thread);
  store_shared(base + static_cast<uint32_t>(sizeof(V)) * static_cast<uint32_t>(thread), value);
  sync_block();
  output(p, 0, thread, load_shared<V>(base + static_cast<uint32_t>(sizeof(V)) * static_cast<uint32_t>(mirrored)));
}

// Each thread counts in a V of its own, beside those of others in the same four bytes.  out0 V[64]
template <class V>
FASTATTN_DEVICE void own_units(const Params& p) {
  const SharedAddress mine = shared_base() + static_cast<uint32_t>(sizeof(V)) * static_cast<uint32_t>(thread_index());
  store_shared(mine, static_cast<V>(thread_index()));
  for (int i = 0; i < p.n[0]; ++i) {
    store_shared(mine, static_cast<V>(load_shared<V>(mine) + 1));
    any_lane(true);
  }
  output(p, 0, thread_index(), load_shared<V>(mine));
}

// in0 int[64] indices, in1 float[64], in2 int[64] -> out0 float, out1 int
FASTATTN_DEVICE void atomics(const Params& p) {
  const int thread = thread_index(), at = input<int>(p, 0, thread);
  atomic_add(static_cast<float*>(p.out[0]) + at, input<float>(p, 1, thread));
  atomic_add(static_cast<int*>(p.out[1]) + at, input<int>(p, 2, thread));
}

// in0 Vec4[32] rows, in1 int[32] which row each lane names -> out0 uint32[32][4]
template <int kMatrices, bool kTransposed>
FASTATTN_DEVICE void load_matrices(const Params& p) {
  const int lane = lane_index();
  const SharedAddress base = shared_base();
  store_shared(base + 16 * static_cast<uint32_t>(lane), input<Vec4>(p, 0, lane));
  sync_warp();
  const SharedAddress row = base + 16 * static_cast<uint32_t>(input<int>(p, 1, lane));
  uint32_t r[kMatrices];
  if constexpr (kMatrices == 4) {
    kTransposed ? load_matrix_x4_transposed(r, row) : load_matrix_x4(r, row);
  } else {
    kTransposed ? load_matrix_x2_transposed(r, row) : load_matrix_x2(r, row);
  }
  for (int i = 0; i < kMatrices; ++i) output(p, 0, lane * kMatrices + i, r[i]);
}

// in0 uint32[32][4], in1 int[32] rows -> out0 Vec4[32]
template <bool kTransposed>
FASTATTN_DEVICE void store_matrices(const Params& p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  const int lane = lane_index();
  const SharedAddress base = shared_base();
  uint32_t r[4];
  for (int i = 0; i < 4; ++i) r[i] = input<uint32_t>(p, 0, lane * 4 + i);
  const SharedAddress row = base + 16 * static_cast<uint32_t>(input<int>(p, 1, lane));
  kTransposed ? store_matrix_x4_transposed(row, r) : store_matrix_x4(row, r);
  sync_warp();
  output(p, 0, lane, load_shared<Vec4>(base + 16 * static_cast<uint32_t>(lane)));
#endif
}

// Fragments: in0 a uint32[32][4], in1 b uint32[32][2], in2 d float[32][4] -> out0 d
template <class T>
FASTATTN_DEVICE void multiply(const Params& p) {
  const int lane = lane_index();
  uint32_t a[4];
  float d[4];
  for (int i = 0; i < 4; ++i) {
    a[i] = input<uint32_t>(p, 0, lane * 4 + i);
    d[i] = input<float>(p, 2, lane * 4 + i);
  }
  multiply_m16n8k16<T>(d, a, input<uint32_t>(p, 1, lane * 2), input<uint32_t>(p, 1, lane * 2 + 1));
  for (int i = 0; i < 4; ++i) output(p, 0, lane * 4 + i, d[i]);
}

// A product as kernels make it: in0 a[16][16], in1 b[n = 8][k = 16] (n0 = 0), or b[k][n] loaded transposed (n0 = 1)
template <class T>
FASTATTN_DEVICE void multiply_from_shared(const Params& p) {
  const int lane = lane_index();
  const SharedAddress a_base = shared_base(), b_base = a_base + 512;
  store_shared(a_base + 16 * static_cast<uint32_t>(lane), input<Vec4>(p, 0, lane));
  if (lane < 16) store_shared(b_base + 16 * static_cast<uint32_t>(lane), input<Vec4>(p, 1, lane));
  sync_warp();
  uint32_t a[4], b[2];
  load_matrix_x4(a, a_base + 32 * static_cast<uint32_t>(lane % 16) + 16 * static_cast<uint32_t>(lane / 16));
  if (p.n[0] == 0) {
    load_matrix_x2(b, b_base + 32 * static_cast<uint32_t>(lane % 8) + 16 * static_cast<uint32_t>(lane / 8 % 2));
  } else if (p.n[0] == 1) {
    load_matrix_x2_transposed(b, b_base + 16 * static_cast<uint32_t>(lane % 16));
  } else {  // wrong: b[k][n] without the transpose
    load_matrix_x2(b, b_base + 16 * static_cast<uint32_t>(lane % 16));
  }
  float d[4] = {};
  multiply_m16n8k16<T>(d, a, b[0], b[1]);
  for (int i = 0; i < 4; ++i) output(p, 0, (block_index() * 32 + lane) * 4 + i, d[i]);
}

// in0 Vec4[64], in1 int[64] valid, in2 uint32[64] -> out0 Vec4[64], out1 uint32[64], each of the mirrored thread
FASTATTN_DEVICE void copies(const Params& p) {
  const int thread = thread_index(), mirrored = block_threads() - 1 - thread;
  const SharedAddress wide = shared_base(), narrow = wide + 1024;
  const bool valid = input<int>(p, 1, thread) != 0;
  copy_async_16(wide + 16 * static_cast<uint32_t>(thread),
                static_cast<const Vec4*>(p.in[0]) + (valid ? thread : 1 << 20), valid);
  copy_async_commit();
  copy_async_4(narrow + 4 * static_cast<uint32_t>(thread),
               static_cast<const uint32_t*>(p.in[2]) + (valid ? thread : 1 << 20), valid);
  copy_async_commit();
  copy_async_wait<1>();
  sync_block();
  output(p, 0, thread, load_shared<Vec4>(wide + 16 * static_cast<uint32_t>(mirrored)));
  copy_async_wait<0>();
  sync_block();
  output(p, 1, thread, load_shared<uint32_t>(narrow + 4 * static_cast<uint32_t>(mirrored)));
}

// Three warps: the first two hand numbers to the third over a slot of shared memory, n0 rounds.
// in0 uint32[n0][64] -> out0 uint32[n0][32] sums
FASTATTN_DEVICE void handover(const Params& p) {
  enum { kFull = 1, kEmpty = 2 };
  const SharedAddress base = shared_base();
  const int thread = thread_index(), lane = lane_index();
  for (int round = 0; round < p.n[0]; ++round) {
    if (warp_index() < 2) {
      if (round > 0) named_barrier_sync(kEmpty, 96);
      store_shared(base + 4 * static_cast<uint32_t>(thread), input<uint32_t>(p, 0, round * 64 + thread));
      named_barrier_arrive(kFull, 96);
    } else {
      named_barrier_sync(kFull, 96);
      output(p, 0, round * 32 + lane,
             load_shared<uint32_t>(base + 4 * static_cast<uint32_t>(lane)) +
                 load_shared<uint32_t>(base + 4 * static_cast<uint32_t>(lane) + 128));
      if (round + 1 < p.n[0]) named_barrier_arrive(kEmpty, 96);
    }
  }
}

// What is in order in global memory: a block's threads with a barrier between, blocks that each keep to half a word,
// and atomics of all.  Two blocks.  out0 int[2][64], out1 int[1], out2 uint16[2]
FASTATTN_DEVICE void orderly_global(const Params& p) {
  int* mine = static_cast<int*>(p.out[0]) + block_index() * block_threads();
  store_global(mine + thread_index(), thread_index());
  sync_block();
  const int other = load_global(mine + block_threads() - 1 - thread_index());
  sync_block();
  store_global(mine + thread_index(), other);
  atomic_add(static_cast<int*>(p.out[1]), 1);
  if (thread_index() == 0) {
    auto* half = static_cast<uint16_t*>(p.out[2]) + block_index();
    store_global(half, static_cast<uint16_t>(load_global(half) + 1));
  }
}

// in0 V[...], in1 int[32]: the unit that each lane stores and loads; for counting wavefronts and sectors
template <class V>
FASTATTN_DEVICE void access_pattern(const Params& p) {
  const int lane = lane_index();
  const uint32_t at = static_cast<uint32_t>(input<int>(p, 1, lane)) * static_cast<uint32_t>(sizeof(V));
  for (uint32_t i = static_cast<uint32_t>(lane); i < static_cast<uint32_t>(p.n[0]); i += 32) {
    store_shared(shared_base() + i * static_cast<uint32_t>(sizeof(V)), V{});
  }
  sync_warp();
  const V value = load_shared<V>(shared_base() + at);
  load_global(static_cast<const V*>(p.in[0]) + at / sizeof(V));
  output(p, 0, lane, value);
}

// in1 int[32]: the 16-byte row that each lane names
FASTATTN_DEVICE void matrix_pattern(const Params& p) {
  for (uint32_t i = static_cast<uint32_t>(lane_index()); i < 512; i += 32) {
    store_shared(shared_base() + 16 * i, Vec4{});
  }
  sync_warp();
  uint32_t r[4];
  load_matrix_x4(r, shared_base() + 16 * static_cast<uint32_t>(input<int>(p, 1, lane_index())));
  output(p, 0, lane_index(), r[0]);
}

// Only every third lane reads, so that the n-th access of one lane is not the n-th of another between barriers.
FASTATTN_DEVICE void predicated_pattern(const Params& p) {
  float sum = 0;
  for (int i = 0; i < 4; ++i) {
    if ((lane_index() + i) % 3 == 0) sum += input<float>(p, 0, i * 32 + lane_index());
    sync_warp();
  }
  output(p, 0, lane_index(), sum);
}

}  // namespace fastattn::cuda::instruction_tests
