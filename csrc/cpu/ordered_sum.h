// Sums of arrays that threads finish in any order, added in one order.
#pragma once

#include <cstring>

#include "arena.h"
#include "vec.h"

namespace fastattn::cpu::FASTATTN_ISA {

// For each of some units the sum of the arrays of its chunks.  Chunk 0's is made in the place of the sum.  Another is
// added by the thread that has made it; where one before it is missing, a copy is kept, and the thread that brings the
// missing one adds it.  Nobody waits, and there are seldom more arrays than threads at work.
template <class T>
class OrderedSum {
 public:
  // An array in blocks of which some hold numbers; the others are zeros that nobody has written.
  struct Array {
    T* numbers = nullptr;
    uint8_t* filled = nullptr;  // of each block
  };

  OrderedSum() = default;
  OrderedSum(const OrderedSum&) = delete;
  OrderedSum& operator=(const OrderedSum&) = delete;
  ~OrderedSum() {
    for (i64 i = 0; i < units_ * chunks_; ++i) std::free(kept_.data()[i]);  // of a call that ran out of memory
  }

  // `block`, the numbers of a block, is a multiple of the vector length.
  void allocate(i64 units, i64 chunks, i64 blocks, i64 block) {
    numbers_ = Buffer<T>(units * blocks * block);
    filled_ = Buffer<uint8_t>(units * blocks);
    next_ = Buffer<i64>(units);
    kept_ = Buffer<T*>(units * chunks);
    units_ = units, chunks_ = chunks, blocks_ = blocks, block_ = block;
    std::memset(next_.data(), 0, units * sizeof(i64));
    std::memset(kept_.data(), 0, units * chunks * sizeof(T*));
  }

  Array sum(i64 unit) const { return {numbers_.data() + unit * blocks_ * block_, filled_.data() + unit * blocks_}; }

  // The array of a chunk is done: `part`, which for chunk 0 is the sum itself.  Calls complete() with the last one's.
  template <class Complete>
  void add(i64 unit, i64 chunk, Array part, Complete complete) {
    i64* const next = next_.data() + unit;  // the chunk whose turn it is, until the thread that adds it moves on
    T** const kept = kept_.data() + unit * chunks_;
    if (chunk > 0 && __atomic_load_n(next, __ATOMIC_SEQ_CST) != chunk) {
      __atomic_store_n(kept + chunk, copy(part), __ATOMIC_SEQ_CST);
      // its turn may have come in between: then one of the two threads takes it
      if (__atomic_load_n(next, __ATOMIC_SEQ_CST) != chunk || !take(unit, kept + chunk)) return;
    } else if (chunk > 0) {
      accumulate(unit, part);
    }
    for (i64 turn = chunk + 1; turn < chunks_; ++turn) {
      __atomic_store_n(next, turn, __ATOMIC_SEQ_CST);
      if (!take(unit, kept + turn)) return;
    }
    complete();
  }

 private:
  // Numbers, with the flags of the blocks after them.
  T* copy(Array part) const {
    T* const numbers = static_cast<T*>(std::malloc(blocks_ * (block_ * sizeof(T) + 1)));
    if (!numbers) throw std::bad_alloc();
    std::memcpy(numbers + blocks_ * block_, part.filled, blocks_);
    for (i64 b = 0; b < blocks_; ++b)
      if (part.filled[b]) std::memcpy(numbers + b * block_, part.numbers + b * block_, block_ * sizeof(T));
    return numbers;
  }

  void accumulate(i64 unit, Array part) const {
    const Array to = sum(unit);
    for (i64 b = 0; b < blocks_; ++b) {
      if (!part.filled[b]) continue;
      T* const into = to.numbers + b * block_;
      const T* const from = part.numbers + b * block_;
      if (!to.filled[b])
        std::memcpy(into, from, block_ * sizeof(T));
      else
        for (i64 i = 0; i < block_; i += kLanes<T>) store(into + i, load(into + i) + load(from + i));
      to.filled[b] = 1;
    }
  }

  // Adds an array that is kept; false where there is none.
  bool take(i64 unit, T** kept) const {
    T* const numbers = __atomic_exchange_n(kept, nullptr, __ATOMIC_SEQ_CST);
    if (!numbers) return false;
    accumulate(unit, {numbers, reinterpret_cast<uint8_t*>(numbers + blocks_ * block_)});
    std::free(numbers);
    return true;
  }

  Buffer<T> numbers_;
  Buffer<uint8_t> filled_;
  Buffer<i64> next_;
  Buffer<T*> kept_;
  i64 units_ = 0, chunks_ = 0, blocks_ = 0, block_ = 0;
};

}  // namespace fastattn::cpu::FASTATTN_ISA
