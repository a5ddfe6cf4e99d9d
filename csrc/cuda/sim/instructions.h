// The face of the simulator to the instruction layer: one function per instruction, called by a simulated thread.
// Any of them may end the launch by throwing; the error names kernel, block, thread and `where`.
#pragma once

#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <source_location>

#include "../arch/launch.h"
#include "../arch/tensor_map.h"

namespace fastattn::cuda::sim {

using Where = std::source_location;

inline constexpr uint32_t kSharedBase = 1024;  // not zero, so that an address that was never set is an error

struct Position {
  int thread;
  int threads;
  int block[3];
  int grid[3];
};
extern Position current_position;
inline const Position& position() { return current_position; }

// The launch of a kernel: `body(params)` is the program of one thread.
void launch(const char* kernel, int threads, int min_blocks, const Launch& launch, const void* params,
            void (*body)(const void*));

[[noreturn]] void unsupported(const char* instruction, Where where);

// Warp.
enum class Shuffle : uint8_t { kIndex, kXor, kUp, kDown };
uint32_t shuffle(Shuffle kind, uint32_t value, int lane, Where where);
uint32_t ballot(bool predicate, Where where);
void sync_warp(Where where);

// Block.
int sync_block(bool predicate, Where where);  // returns how many predicates hold
void named_barrier(int id, int threads, bool wait, Where where);

// Memory.
void load_shared(void* to, uint32_t address, int bytes, Where where);
void store_shared(uint32_t address, const void* from, int bytes, Where where);
void load_global(void* to, const void* address, int bytes, bool constant, Where where);
void store_global(void* address, const void* from, int bytes, Where where);
float atomic_add(float* address, float value, Where where);
int atomic_add(int* address, int value, Where where);
void copy_async(uint32_t to, const void* from, int bytes, bool valid, Where where);
void copy_async_commit(Where where);
void copy_async_wait(int pending, Where where);

// Matrices.
void load_matrix(uint32_t* r, int matrices, bool transposed, uint32_t row, Where where);
void store_matrix(uint32_t row, const uint32_t* r, int matrices, bool transposed, Where where);
void multiply_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool half, Where where);

// Warpgroups.
void registers_increase(int registers, Where where);
void registers_decrease(int registers, Where where);
enum class Operands : uint8_t { kHalf, kBFloat16, kE4M3 };
// `a`: registers, or null and the descriptor counts.
void warpgroup_multiply(float* d, int n, const uint32_t* a, uint64_t a_descriptor, uint64_t b_descriptor,
                        bool accumulate, Operands type, bool transposed_a, bool transposed_b, Where where);
void warpgroup_fence(Where where);
void warpgroup_commit(Where where);
void warpgroup_wait(int pending, Where where);

// mbarriers, and copies that run beside the threads.
void mbarrier_init(uint32_t barrier, uint32_t arrivals, Where where);
void mbarrier_init_fence(Where where);
void mbarrier_invalidate(uint32_t barrier, Where where);
void mbarrier_arrive(uint32_t barrier, Where where);
void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes, Where where);
void mbarrier_expect(uint32_t barrier, uint32_t bytes, Where where);
bool mbarrier_try_wait(uint32_t barrier, uint32_t parity, Where where);
void mbarrier_wait(uint32_t barrier, uint32_t parity, Where where);
void fence_async_shared(Where where);
bool elect_one(Where where);
void prefetch_tensor_map(const TensorMap* map, Where where);
using Coordinates = std::initializer_list<int>;
void tensor_load(uint32_t to, const TensorMap* map, uint32_t barrier, Coordinates at, Where where);
void tensor_store(const TensorMap* map, uint32_t from, Coordinates at, Where where);
void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, Where where);
void bulk_reduce_add(float* to, uint32_t from, uint32_t bytes, Where where);
void bulk_commit(Where where);
void bulk_wait(int pending, bool only_reads, Where where);

// What the registers of an accumulator hold before its products are waited for: a NaN that arithmetic hands on.
inline constexpr uint32_t kInFlightBits = 0x7FD5BAD5u;

// Numbers.
uint16_t round_to_16(float value, bool half);  // to nearest even; NaN becomes 0x7FFF, as cvt makes it
float widen_from_16(uint16_t value, bool half);
uint8_t round_to_e4m3(float value);  // to nearest even, beyond 448 to it; NaN becomes 0x7F

template <class V>
uint32_t to_bits(V value) {
  static_assert(sizeof(V) == 4);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
template <class V>
V from_bits(uint32_t bits) {
  static_assert(sizeof(V) == 4);
  V value;
  std::memcpy(&value, &bits, 4);
  return value;
}
// Subnormal numbers become zero of the same sign.
inline float flush(float x) {
  const uint32_t bits = to_bits(x);
  return (bits & 0x7F800000u) == 0 ? from_bits<float>(bits & 0x80000000u) : x;
}

}  // namespace fastattn::cuda::sim
