// What sm_90a adds: mbarriers, tensor copies (TMA), warpgroup products (wgmma), register budgets, proxy fences.
#pragma once

#include "memory.h"
#include "tensor_map.h"

namespace fastattn::cuda {

// The simulator's call, or the instruction.
#ifdef __CUDACC__
#define FASTATTN_HOPPER_BODY(simulated, ...) __VA_ARGS__
#else
#define FASTATTN_HOPPER_BODY(simulated, ...) simulated
#endif

// ---- mbarrier: 8 bytes of shared memory, 8-aligned.  A phase completes when `arrivals` threads have arrived and all
// bytes that were announced have come; `parity` is 0 for the first phase, 1 for the second, and so on.

FASTATTN_DEVICE void mbarrier_init(SharedAddress barrier, uint32_t arrivals FASTATTN_WHERE) {
  FASTATTN_HOPPER_BODY(
      sim::mbarrier_init(barrier, arrivals, where),
      asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory"));
}

// After the barriers are initialised, before other threads (with sync_block) or tensor copies use them.
FASTATTN_DEVICE void mbarrier_init_fence(FASTATTN_WHERE_ONLY) {
  FASTATTN_HOPPER_BODY(sim::mbarrier_init_fence(where),
                       asm volatile("fence.mbarrier_init.release.cluster;" :: : "memory"));
}

FASTATTN_DEVICE void mbarrier_invalidate(SharedAddress barrier FASTATTN_WHERE) {
  FASTATTN_HOPPER_BODY(sim::mbarrier_invalidate(barrier, where),
                       asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(barrier) : "memory"));
}

FASTATTN_DEVICE void mbarrier_arrive(SharedAddress barrier FASTATTN_WHERE) {
  FASTATTN_HOPPER_BODY(sim::mbarrier_arrive(barrier, where),
                       asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"));
}

// Arrives and announces `bytes` that copies will bring.
FASTATTN_DEVICE void mbarrier_arrive_expect(SharedAddress barrier, uint32_t bytes FASTATTN_WHERE) {
  FASTATTN_HOPPER_BODY(
      sim::mbarrier_arrive_expect(barrier, bytes, where),
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory"));
}

// Announces bytes without arriving.
FASTATTN_DEVICE void mbarrier_expect(SharedAddress barrier, uint32_t bytes FASTATTN_WHERE) {
  FASTATTN_HOPPER_BODY(
      sim::mbarrier_expect(barrier, bytes, where),
      asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory"));
}

// Whether the phase of this parity is complete; waits at most a time the chip chooses.
FASTATTN_DEVICE bool mbarrier_try_wait(SharedAddress barrier, uint32_t parity FASTATTN_WHERE) {
#ifdef __CUDACC__
  uint32_t done;
  asm volatile(
      "{\n.reg .pred done;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n}"
      : "=r"(done)
      : "r"(barrier), "r"(parity)
      : "memory");
  return done != 0;
#else
  return sim::mbarrier_try_wait(barrier, parity, where);
#endif
}

FASTATTN_DEVICE void mbarrier_wait(SharedAddress barrier, uint32_t parity FASTATTN_WHERE) {
#ifdef __CUDACC__
  while (!mbarrier_try_wait(barrier, parity)) {
  }
#else
  sim::mbarrier_wait(barrier, parity, where);
#endif
}

// ---- Fences and named registers of a warpgroup.

// Between writes to shared memory by threads and reads of them by tensor copies or wgmma (the async proxy).
FASTATTN_DEVICE void fence_async_shared(FASTATTN_WHERE_ONLY) {
  FASTATTN_HOPPER_BODY(sim::fence_async_shared(where), asm volatile("fence.proxy.async.shared::cta;" :: : "memory"));
}

// A warpgroup takes registers from, or gives them to, the block's pool; a multiple of 8 between 24 and 256.
template <int Registers>
FASTATTN_DEVICE void registers_increase(FASTATTN_WHERE_ONLY) {
  static_assert(Registers >= 24 && Registers <= 256 && Registers % 8 == 0);
  FASTATTN_HOPPER_BODY(sim::registers_increase(Registers, where),
                       asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers)));
}

template <int Registers>
FASTATTN_DEVICE void registers_decrease(FASTATTN_WHERE_ONLY) {
  static_assert(Registers >= 24 && Registers <= 256 && Registers % 8 == 0);
  FASTATTN_HOPPER_BODY(sim::registers_decrease(Registers, where),
                       asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers)));
}

// One lane of the warp, the same every time, is told that it is the one.
FASTATTN_DEVICE bool elect_one(FASTATTN_WHERE_ONLY) {
#ifdef __CUDACC__
  uint32_t elected;
  asm volatile(
      "{\n.reg .pred elected;\n"
      "elect.sync _|elected, 0xFFFFFFFF;\n"
      "selp.u32 %0, 1, 0, elected;\n}"
      : "=r"(elected)::"memory");
  return elected != 0;
#else
  return sim::elect_one(where);
#endif
}

// ---- Tensor copies.  A tensor map (tensor_map.h) is passed inside a kernel's __grid_constant__ parameters;
// coordinates are elements, the innermost first.

// How long L2 keeps what a copy reads (the createpolicy encodings that CUTLASS names EVICT_NORMAL and so on).
enum class CachePolicy : uint64_t {
  kNormal = 0x1000000000000000,
  kEvictFirst = 0x12F0000000000000,
  kEvictLast = 0x14F0000000000000,
};

FASTATTN_DEVICE void prefetch_tensor_map(const TensorMap* map FASTATTN_WHERE) {
  FASTATTN_HOPPER_BODY(sim::prefetch_tensor_map(map, where),
                       asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"));
}

#define FASTATTN_TENSOR_LOAD "d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "

// Loads a box to shared memory and counts its bytes towards `barrier`.  What lies outside the tensor is zero.
FASTATTN_DEVICE void tensor_load_2d(SharedAddress to, const TensorMap* map, SharedAddress barrier, int c0, int c1,
                                    [[maybe_unused]] CachePolicy policy FASTATTN_WHERE) {
  FASTATTN_HOPPER_BODY(
      sim::tensor_load(to, map, barrier, (sim::Coordinates{c0, c1}), where),
      asm volatile("cp.async.bulk.tensor.2" FASTATTN_TENSOR_LOAD "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to), "l"(map),
                   "r"(barrier), "r"(c0), "r"(c1), "l"(static_cast<uint64_t>(policy)) : "memory"));
}

FASTATTN_DEVICE void tensor_load_3d(SharedAddress to, const TensorMap* map, SharedAddress barrier, int c0, int c1,
                                    int c2, [[maybe_unused]] CachePolicy policy FASTATTN_WHERE) {
  FASTATTN_HOPPER_BODY(
      sim::tensor_load(to, map, barrier, (sim::Coordinates{c0, c1, c2}), where),
      asm volatile("cp.async.bulk.tensor.3" FASTATTN_TENSOR_LOAD "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(to),
                   "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "l"(static_cast<uint64_t>(policy)) : "memory"));
}

FASTATTN_DEVICE void tensor_load_4d(SharedAddress to, const TensorMap* map, SharedAddress barrier, int c0, int c1,
                                    int c2, int c3, [[maybe_unused]] CachePolicy policy FASTATTN_WHERE) {
  FASTATTN_HOPPER_BODY(
      sim::tensor_load(to, map, barrier, (sim::Coordinates{c0, c1, c2, c3}), where),
      asm volatile("cp.async.bulk.tensor.4" FASTATTN_TENSOR_LOAD "[%0], [%1, {%3, %4, %5, %6}], [%2], %7;" ::"r"(to),
                   "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3),
                   "l"(static_cast<uint64_t>(policy)) : "memory"));
}

FASTATTN_DEVICE void tensor_load_5d(SharedAddress to, const TensorMap* map, SharedAddress barrier, int c0, int c1,
                                    int c2, int c3, int c4, [[maybe_unused]] CachePolicy policy FASTATTN_WHERE) {
  FASTATTN_HOPPER_BODY(sim::tensor_load(to, map, barrier, (sim::Coordinates{c0, c1, c2, c3, c4}), where),
                       asm volatile("cp.async.bulk.tensor.5" FASTATTN_TENSOR_LOAD
                                    "[%0], [%1, {%3, %4, %5, %6, %7}], [%2], %8;" ::"r"(to),
                                    "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4),
                                    "l"(static_cast<uint64_t>(policy)) : "memory"));
}

#undef FASTATTN_TENSOR_LOAD

// Stores a box from shared memory, in the bulk group of this thread; parts outside the tensor are not written.
FASTATTN_DEVICE void tensor_store_2d(const TensorMap* map, SharedAddress from, int c0, int c1 FASTATTN_WHERE) {
  FASTATTN_HOPPER_BODY(
      sim::tensor_store(map, from, (sim::Coordinates{c0, c1}), where),
      asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(from),
                   "r"(c0), "r"(c1) : "memory"));
}

FASTATTN_DEVICE void tensor_store_3d(const TensorMap* map, SharedAddress from, int c0, int c1, int c2 FASTATTN_WHERE) {
  FASTATTN_HOPPER_BODY(
      sim::tensor_store(map, from, (sim::Coordinates{c0, c1, c2}), where),
      asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                   "r"(from), "r"(c0), "r"(c1), "r"(c2) : "memory"));
}

FASTATTN_DEVICE void tensor_store_4d(const TensorMap* map, SharedAddress from, int c0, int c1, int c2,
                                     int c3 FASTATTN_WHERE) {
  FASTATTN_HOPPER_BODY(
      sim::tensor_store(map, from, (sim::Coordinates{c0, c1, c2, c3}), where),
      asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
                   "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3) : "memory"));
}

FASTATTN_DEVICE void tensor_store_5d(const TensorMap* map, SharedAddress from, int c0, int c1, int c2, int c3,
                                     int c4 FASTATTN_WHERE) {
  FASTATTN_HOPPER_BODY(
      sim::tensor_store(map, from, (sim::Coordinates{c0, c1, c2, c3, c4}), where),
      asm volatile("cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
                   "r"(from), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4) : "memory"));
}

// Contiguous bytes, a multiple of 16 at 16-aligned addresses: a load that counts towards `barrier`, ...
FASTATTN_DEVICE void bulk_load(SharedAddress to, const void* from, uint32_t bytes,
                               SharedAddress barrier FASTATTN_WHERE) {
  FASTATTN_HOPPER_BODY(
      sim::bulk_load(to, from, bytes, barrier, where),
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                   "l"(from), "r"(bytes), "r"(barrier) : "memory"));
}

// ... and float32 numbers added to global memory, in the bulk group of this thread.
FASTATTN_DEVICE void bulk_reduce_add(float* to, SharedAddress from, uint32_t bytes FASTATTN_WHERE) {
  FASTATTN_HOPPER_BODY(
      sim::bulk_reduce_add(to, from, bytes, where),
      asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(from),
                   "r"(bytes) : "memory"));
}

FASTATTN_DEVICE void bulk_commit(FASTATTN_WHERE_ONLY) {
  FASTATTN_HOPPER_BODY(sim::bulk_commit(where), asm volatile("cp.async.bulk.commit_group;" :: : "memory"));
}

// Waits until at most `Pending` bulk groups of this thread are under way.
template <int Pending>
FASTATTN_DEVICE void bulk_wait(FASTATTN_WHERE_ONLY) {
  FASTATTN_HOPPER_BODY(sim::bulk_wait(Pending, /*only_reads=*/false, where),
                       asm volatile("cp.async.bulk.wait_group %0;" ::"n"(Pending) : "memory"));
}

// Waits until at most `Pending` have their sources in shared memory still to be read.
template <int Pending>
FASTATTN_DEVICE void bulk_wait_read(FASTATTN_WHERE_ONLY) {
  FASTATTN_HOPPER_BODY(sim::bulk_wait(Pending, /*only_reads=*/true, where),
                       asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Pending) : "memory"));
}

// ---- stmatrix: load_matrix_x4 in the other direction.

FASTATTN_DEVICE void store_matrix_x4(SharedAddress row, const uint32_t (&r)[4] FASTATTN_WHERE) {
#ifdef __CUDACC__
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]), "r"(r[1]),
               "r"(r[2]), "r"(r[3])
               : "memory");
#else
  sim::store_matrix(row, r, 4, /*transposed=*/false, where);
#endif
}

FASTATTN_DEVICE void store_matrix_x4_transposed(SharedAddress row, const uint32_t (&r)[4] FASTATTN_WHERE) {
#ifdef __CUDACC__
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(r[0]),
               "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#else
  sim::store_matrix(row, r, 4, /*transposed=*/true, where);
#endif
}

// ---- wgmma: a warpgroup of 128 threads multiplies; the products themselves are in wgmma.h.

// Before the first product, and before each batch whose registers were touched since.
FASTATTN_DEVICE void warpgroup_fence(FASTATTN_WHERE_ONLY) {
  FASTATTN_HOPPER_BODY(sim::warpgroup_fence(where), asm volatile("wgmma.fence.sync.aligned;" :: : "memory"));
}

FASTATTN_DEVICE void warpgroup_commit(FASTATTN_WHERE_ONLY) {
  FASTATTN_HOPPER_BODY(sim::warpgroup_commit(where), asm volatile("wgmma.commit_group.sync.aligned;" :: : "memory"));
}

template <int Pending>
FASTATTN_DEVICE void warpgroup_wait(FASTATTN_WHERE_ONLY) {
  FASTATTN_HOPPER_BODY(sim::warpgroup_wait(Pending, where),
                       asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory"));
}

// A matrix descriptor (PTX manual, "Matrix descriptor format").  Byte distances between groups of eight rows: `leading`
// and `stride` have the manual's meaning, which depends on the operand's major axis.
FASTATTN_HOST_DEVICE uint64_t matrix_descriptor(SharedAddress start, uint32_t leading, uint32_t stride,
                                                Swizzle swizzle) {
  return static_cast<uint64_t>((start & 0x3FFFFu) >> 4) | static_cast<uint64_t>((leading & 0x3FFFFu) >> 4) << 16 |
         static_cast<uint64_t>((stride & 0x3FFFFu) >> 4) << 32 | static_cast<uint64_t>(swizzle) << 62;
}

#undef FASTATTN_HOPPER_BODY

}  // namespace fastattn::cuda

#include "wgmma.h"
