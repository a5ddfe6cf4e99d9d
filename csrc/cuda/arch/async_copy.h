// cp.async (sm_80): copies from global to shared memory that pass by the registers.  They are complete for the thread
// that issued them once it has waited for their group; other threads see them after a barrier behind that wait.
#pragma once

#include "memory.h"

namespace fastattn::cuda {

// Both addresses are multiples of 16.  Where not `valid`, 16 zero bytes are written and nothing is read.
FASTATTN_DEVICE void copy_async_16(SharedAddress to, const void* from, bool valid FASTATTN_WHERE) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
#else
  sim::copy_async(to, from, 16, valid, where);
#endif
}

// The same for 4 bytes, through L1.
FASTATTN_DEVICE void copy_async_4(SharedAddress to, const void* from, bool valid FASTATTN_WHERE) {
#ifdef __CUDACC__
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(valid ? 4 : 0) : "memory");
#else
  sim::copy_async(to, from, 4, valid, where);
#endif
}

// Closes a group: the copies this thread issued since the last one.
FASTATTN_DEVICE void copy_async_commit(FASTATTN_WHERE_ONLY) {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  sim::copy_async_commit(where);
#endif
}

// Waits until at most `Pending` of this thread's newest groups are under way.
template <int Pending>
FASTATTN_DEVICE void copy_async_wait(FASTATTN_WHERE_ONLY) {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
#else
  sim::copy_async_wait(Pending, where);
#endif
}

}  // namespace fastattn::cuda
