// Scratch memory of one thread: laid out by the same function that measures it, kept between calls.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <new>

#include "../common/problem.h"

namespace fastattn::cpu {

// Hands out 64-byte aligned arrays.  With a null base it only counts.
class Arena {
 public:
  explicit Arena(char* base) : base_(base) {}
  template <class T>
  T* take(i64 count) {
    T* result = reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return result;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// A thread's buffer of at least `bytes`.  Small buffers stay with the thread (a call on short sequences would spend
// its time in page faults otherwise); a large one is given back by the next call that needs less.
char* thread_scratch(size_t bytes);

}  // namespace fastattn::cpu
