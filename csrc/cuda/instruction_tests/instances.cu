#include <cstdio>
#include <stdexcept>
#include <string>

#include "planted_bugs.h"
#include "run.h"

namespace fastattn::cuda::instruction_tests {

// name, (function), threads
#define FASTATTN_INSTRUCTION_TESTS(X)                                       \
  X(positions, (positions), 64)                                             \
  X(pack_f16, (pack<Half>), 64)                                             \
  X(pack_bf16, (pack<BFloat16>), 64)                                        \
  X(unpack_f16, (unpack<Half>), 64)                                         \
  X(unpack_bf16, (unpack<BFloat16>), 64)                                    \
  X(functions, (functions), 64)                                             \
  X(shuffles, (shuffles), 32)                                               \
  X(votes, (votes), 64)                                                     \
  X(copy_1, (copy_units<uint8_t>), 64)                                      \
  X(copy_2, (copy_units<uint16_t>), 64)                                     \
  X(copy_4, (copy_units<uint32_t>), 64)                                     \
  X(copy_8, (copy_units<Vec2>), 64)                                         \
  X(copy_16, (copy_units<Vec4>), 64)                                        \
  X(own_units_1, (own_units<uint8_t>), 64)                                  \
  X(own_units_2, (own_units<uint16_t>), 64)                                 \
  X(atomics, (atomics), 64)                                                 \
  X(load_matrix_x4, (load_matrices<4, false>), 32)                          \
  X(load_matrix_x4_transposed, (load_matrices<4, true>), 32)                \
  X(load_matrix_x2, (load_matrices<2, false>), 32)                          \
  X(load_matrix_x2_transposed, (load_matrices<2, true>), 32)                \
  X(store_matrix_x4, (store_matrices<false>), 32)                           \
  X(store_matrix_x4_transposed, (store_matrices<true>), 32)                 \
  X(multiply_f16, (multiply<Half>), 32)                                     \
  X(multiply_bf16, (multiply<BFloat16>), 32)                                \
  X(multiply_from_shared_f16, (multiply_from_shared<Half>), 32)             \
  X(multiply_from_shared_bf16, (multiply_from_shared<BFloat16>), 32)        \
  X(copies, (copies), 64)                                                   \
  X(handover, (handover), 96)                                               \
  X(orderly_global, (orderly_global), 64)                                   \
  X(access_pattern_1, (access_pattern<uint8_t>), 32)                        \
  X(access_pattern_4, (access_pattern<uint32_t>), 32)                       \
  X(access_pattern_8, (access_pattern<Vec2>), 32)                           \
  X(access_pattern_16, (access_pattern<Vec4>), 32)                          \
  X(matrix_pattern, (matrix_pattern), 32)                                   \
  X(predicated_pattern, (predicated_pattern), 32)                           \
  X(missing_barrier, (missing_barrier), 64)                                 \
  X(missing_second_barrier, (missing_second_barrier), 64)                   \
  X(missing_sync_warp, (missing_sync_warp), 32)                             \
  X(shuffle_for_sync_warp, (shuffle_for_sync_warp), 32)                     \
  X(missing_sync_before_load_matrix, (missing_sync_before_load_matrix), 32) \
  X(missing_wait, (missing_wait), 64)                                       \
  X(wait_for_older_group, (wait_for_older_group), 64)                       \
  X(missing_commit, (missing_commit), 64)                                   \
  X(missing_barrier_after_wait, (missing_barrier_after_wait), 64)           \
  X(refill_before_barrier, (refill_before_barrier), 64)                     \
  X(store_behind_shared, (store_behind_shared), 64)                         \
  X(store_before_shared, (store_before_shared), 64)                         \
  X(unset_shared_address, (unset_shared_address), 64)                       \
  X(store_behind_global, (store_behind_global), 64)                         \
  X(load_before_global, (load_before_global), 64)                           \
  X(copy_behind_global, (copy_behind_global), 64)                           \
  X(store_to_input, (store_to_input), 64)                                   \
  X(atomic_to_input, (atomic_to_input), 64)                                 \
  X(misaligned_shared, (misaligned_shared), 64)                             \
  X(misaligned_global, (misaligned_global), 64)                             \
  X(misaligned_load_matrix, (misaligned_load_matrix), 32)                   \
  X(misaligned_copy, (misaligned_copy), 64)                                 \
  X(blocks_store_the_same, (blocks_store_the_same), 64)                     \
  X(blocks_add_without_atomics, (blocks_add_without_atomics), 64)           \
  X(block_reads_another, (block_reads_another), 64)                         \
  X(block_writes_what_another_read, (block_writes_what_another_read), 64)   \
  X(store_beside_atomics, (store_beside_atomics), 64)                       \
  X(missing_barrier_in_global, (missing_barrier_in_global), 64)             \
  X(divergent_shuffle, (divergent_shuffle), 32)                             \
  X(divergent_multiply, (divergent_multiply), 32)                           \
  X(divergent_barrier, (divergent_barrier), 64)                             \
  X(exit_before_barrier, (exit_before_barrier), 96)                         \
  X(deadlocked_barriers, (deadlocked_barriers), 64)                         \
  X(barrier_for_different_counts, (barrier_for_different_counts), 64)       \
  X(barrier_for_half_a_warp, (barrier_for_half_a_warp), 64)                 \
  X(barrier_number_16, (barrier_number_16), 64)                             \
  X(uninitialised_shared, (uninitialised_shared), 64)                       \
  X(uninitialised_matrix_row, (uninitialised_matrix_row), 32)               \
  X(uninitialised_register, (uninitialised_register), 32)

#define FASTATTN_INSTANCE(name, function, threads) FASTATTN_KERNEL(test_##name, Params, function, threads, 1)
FASTATTN_INSTRUCTION_TESTS(FASTATTN_INSTANCE)

void run(const std::string& name, const Launch& launch, const Params& params) {
#define FASTATTN_RUN(test, function, threads) \
  if (name == #test) return test_##test(launch, params);
  FASTATTN_INSTRUCTION_TESTS(FASTATTN_RUN)
  throw std::invalid_argument("no instruction test is called " + name);
}

}  // namespace fastattn::cuda::instruction_tests

// For ctypes: null, or what went wrong.
extern "C" __attribute__((visibility("default"))) const char* fastattn_instruction_test(
    const char* name, const void* const* in, void* const* out, const int* n, const int* grid, int shared_bytes) {
  static char error[512];
  fastattn::cuda::instruction_tests::Params params{};
  for (int i = 0; i < 4; ++i) params.in[i] = in[i], params.out[i] = out[i], params.n[i] = n[i];
  try {
    fastattn::cuda::instruction_tests::run(
        name, {.grid_x = grid[0], .grid_y = grid[1], .grid_z = grid[2], .shared_bytes = shared_bytes}, params);
  } catch (const std::exception& exception) {
    std::snprintf(error, sizeof error, "%s", exception.what());
    return error;
  }
  return nullptr;
}
