// Counts what a warp's accesses cost: banks of shared memory, sectors of global memory.
//
// The simulator runs lanes one after the other, so the accesses that a warp would make in one instruction come at
// different times.  They are put together again: between two points where all lanes meet, the n-th time that a lane
// comes to a source line belongs with the n-th time of the others.
#pragma once

#include <cstdint>
#include <vector>

#include "simulator.h"

namespace fastattn::cuda::sim {

// What a kernel's requests cost, by source line.
class Traffics {
 public:
  void add(uint32_t site, Access access, const Traffic& traffic);
  // Totals and lines into the report, and back to nothing.
  void report(Report& report);

 private:
  struct Line {
    Access access = Access::kCount;
    Traffic traffic;
  };
  std::vector<std::vector<Line>> lines_;  // [site]
};

// The pending requests of one warp.
class Requests {
 public:
  void access(int lane, uint32_t site, Access access, uint64_t address, int bytes);
  // All lanes have met: what is pending is complete.
  void flush(Traffics& traffics);

 private:
  struct Request {
    uint32_t site;
    Access access;
    uint8_t bytes;
    uint32_t lanes;  // a bit for each
    uint64_t address[32];
  };
  std::vector<Request> pending_;
  uint32_t next_[32] = {};  // where to begin to look, of each lane
};

// Wavefronts that one pass of at most 32 words takes: how many different words the busiest bank has to give.
int wavefronts(const uint32_t* words, int count);

}  // namespace fastattn::cuda::sim
