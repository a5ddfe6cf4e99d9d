// A fiber: a flow of control with a stack of its own that gives way by name.  A simulated thread is one.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace fastattn::cuda::sim {

class Fiber {
 public:
  Fiber() = default;  // the caller's own flow of control
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber();

  // Takes a stack, with a guard page below it; `colour` spreads the stacks of many fibers over the sets of the cache.
  void allocate(int colour);

  // The next jump here begins `entry`, which must not return.  What ran here before is forgotten.
  void prepare(void (*entry)());

  // Suspends the running fiber `from` and goes on with `to`.
  static void jump(Fiber& from, Fiber& to);

 private:
  std::byte* mapping_ = nullptr;
  std::byte* top_ = nullptr;
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace fastattn::cuda::sim
