#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>

namespace fastattn::cuda::sim {

namespace {

constexpr size_t kStackBytes = 256 * 1024;
size_t page_bytes() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }

}  // namespace

void Fiber::allocate(int colour) {
  const size_t guard = page_bytes();
  void* mapping = mmap(nullptr, guard + kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<std::byte*>(mapping);
  mprotect(mapping_, guard, PROT_NONE);
  // Without it all stacks would begin at the same offset in a page, and 32 of them in one set of an 8-way cache.
  top_ = mapping_ + guard + kStackBytes - static_cast<size_t>(colour % 32) * 576;
}

Fiber::~Fiber() {
  if (mapping_ != nullptr) munmap(mapping_, page_bytes() + kStackBytes);
}

#if defined(__x86_64__)

namespace {

// Saves the registers that a callee must keep on the stack of the one, and takes those of the other from its.
__attribute__((naked, noinline)) void switch_stacks(void** /*from*/, void* /*to*/) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret\n");
}

}  // namespace

void Fiber::prepare(void (*entry)()) {
  // As after a call: the stack pointer is 8 off a multiple of 16, and above it lies a return address, here none.
  uint64_t* slot = reinterpret_cast<uint64_t*>(reinterpret_cast<uintptr_t>(top_) & ~uintptr_t{15});
  *--slot = 0;
  *--slot = reinterpret_cast<uint64_t>(entry);
  for (int i = 0; i < 6; ++i) *--slot = 0;
  stack_pointer_ = slot;
}

void Fiber::jump(Fiber& from, Fiber& to) { switch_stacks(&from.stack_pointer_, to.stack_pointer_); }

#else

void Fiber::prepare(void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = mapping_ + page_bytes();
  context_.uc_stack.ss_size = static_cast<size_t>(top_ - (mapping_ + page_bytes()));
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
}

void Fiber::jump(Fiber& from, Fiber& to) { swapcontext(&from.context_, &to.context_); }

#endif

}  // namespace fastattn::cuda::sim
