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
  FASTATTN_INLINE explicit Arena(char* base) : base_(base) {}
  template <class T>
  FASTATTN_INLINE T* take(i64 count) {
    T* result = reinterpret_cast<T*>(base_ + used_);
    used_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return result;
  }
  FASTATTN_INLINE size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// Memory shared by the items of one call; not initialised.
template <class T>
class Buffer {
 public:
  FASTATTN_INLINE Buffer() {}
  FASTATTN_INLINE explicit Buffer(i64 count)
      : data_(static_cast<T*>(std::malloc(static_cast<size_t>(count) * sizeof(T) + 64))) {
    if (!data_) throw std::bad_alloc();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  FASTATTN_INLINE Buffer& operator=(Buffer&& other) noexcept {
    T* const mine = data_;
    data_ = other.data_;
    other.data_ = mine;
    return *this;
  }
  FASTATTN_INLINE ~Buffer() { std::free(data_); }
  FASTATTN_INLINE T* data() const { return data_; }

 private:
  T* data_ = nullptr;
};

// A thread's buffer of at least `bytes`.  Small buffers stay with the thread (a call on short sequences would spend
// its time in page faults otherwise); a large one is given back by the next call that needs less.
char* thread_scratch(size_t bytes);

}  // namespace fastattn::cpu
