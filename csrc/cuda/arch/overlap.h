// Keeping what the compiler would move where it was written.
#pragma once

#include "warp.h"

namespace fastattn::cuda {

// Registers that an asynchronous product writes are read after this line and not before.  No instruction.
template <int N>
FASTATTN_DEVICE void settle([[maybe_unused]] float (&registers)[N]) {
#ifdef __CUDACC__
  FASTATTN_UNROLL
  for (int n = 0; n < N; ++n) asm volatile("" : "+f"(registers[n])::"memory");
#endif
}

// The same number, of which the compiler knows nothing: what follows from it is computed after this line, and takes no
// registers through a loop around it.
FASTATTN_DEVICE int unknown(int x) {
#ifdef __CUDACC__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Everything that `sum`, never negative, is made of is computed before this line.  ptxas sinks exponentials below the
// wait for a product that is under way beside them, and then nothing overlaps; of what was tried (volatile, empty
// asm statements, __syncwarp), a branch that depends on all of them and is never taken is what holds them.
FASTATTN_DEVICE void finish_before([[maybe_unused]] float sum) {
#ifdef __CUDACC__
  if (__any_sync(0xFFFFFFFFu, sum < -1.0f)) asm volatile("nanosleep.u32 1;" ::: "memory");
#endif
}

// The same for what `bits` are made of, whose sign is never set.
FASTATTN_DEVICE void finish_before([[maybe_unused]] uint32_t bits) {
#ifdef __CUDACC__
  if (__any_sync(0xFFFFFFFFu, static_cast<int32_t>(bits) < 0)) asm volatile("nanosleep.u32 1;" ::: "memory");
#endif
}

}  // namespace fastattn::cuda
