// Reads of shared memory by what runs beside the threads: copies to global memory, and products of warpgroups.  Such a
// read goes on from the instruction that issues it to the wait that ends it; who writes there must know that it ended.
#pragma once

#include <cstdint>
#include <vector>

#include "races.h"

namespace fastattn::cuda::sim {

class AsyncReads {
 public:
  static constexpr int kParts = 4;

  // By the warps of a warpgroup, each of which waits by itself, or (`thread` >= 0) by a copy of one thread.
  struct Read {
    int first_warp;
    int thread;
    uint32_t site;
    bool over[kParts];       // the warp, or the thread (part 0), has waited
    uint32_t epoch[kParts];  // in which it goes on
  };

  void begin_block(int threads, size_t shared_bytes);
  // Numbers begin at one.
  uint32_t open(int first_warp, int thread, uint32_t site);
  // `at` and `bytes` are multiples of 16.
  void note(uint32_t read, uint32_t at, int bytes);
  void end(uint32_t read, int part, uint32_t epoch);
  // A read of these bytes that is not over for the writer; null: there is none.  Without a clock, only what is under
  // way counts.
  const Read* find(int writer, const Clock* clock, uint32_t at, int bytes) const;
  bool is_under_way(const Read& read) const;

 private:
  static constexpr uint32_t kUnit = 16;

  size_t columns_ = 0;            // one for each warpgroup, and one for the copies of threads
  uint32_t before_ = 0;           // numbers up to here are of earlier blocks
  std::vector<Read> reads_;       // [number - before_ - 1]
  std::vector<uint32_t> latest_;  // [unit of memory][column]: the last read
};

}  // namespace fastattn::cuda::sim
