// Finds accesses to shared memory that nothing orders: vector clocks of threads, joined by barriers, and for every four
// bytes the last write and each warp's last read (after Flanagan and Freund, "FastTrack", PLDI 2009).
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace fastattn::cuda::sim {

// What a thread knows of the others: everything that thread u did in epochs up to known[u] happened before.  Threads
// that met at a barrier share one; each thread's own epoch is kept beside it.
struct Clock {
  std::vector<uint32_t> known;
  std::vector<uint32_t> known_of_warp;  // the least of a warp's lanes
};

// A thread's place in time.
struct Time {
  std::shared_ptr<const Clock> clock;
  uint32_t epoch = 0;
};

struct Conflict {
  bool found = false;
  bool was_write = false;
  int thread = 0;  // -1: several lanes of the warp
  int warp = 0;
  uint32_t site = 0;
};

class Races {
 public:
  void begin_block(int threads, size_t shared_bytes, std::vector<Time>& times);

  // All those in `arrived` have happened before what each of `waiting` does next.
  void join(const std::vector<std::pair<int, Time>>& arrived, const int* waiting, int count, std::vector<Time>& times);
  // The lanes of a warp that announced something go on in a new epoch.
  void advance(Time* times, int count) {
    ++last_epoch_;
    for (int i = 0; i < count; ++i) times[i].epoch = last_epoch_;
  }

  // Checks and notes an access of `bytes` at offset `at`.  A conflict is returned, not noted.
  Conflict read(int thread, const Time& time, uint32_t at, int bytes, uint32_t site);
  Conflict write(int thread, const Time& time, uint32_t at, int bytes, uint32_t site);
  // A read on behalf of all lanes of a warp that share one time.
  Conflict read_by_warp(int warp, const Time& time, uint32_t at, int bytes, uint32_t site);
  // Only checks that a write now would be in order.
  Conflict check_write(int thread, const Time& time, uint32_t at, int bytes);

 private:
  // One of each kind for four bytes: where lanes use different bytes of them, the last one stays.  That can hide a race
  // between single bytes, and never makes one up.
  struct Event {
    uint32_t epoch = 0;  // 0: none
    uint32_t site = 0;
    uint16_t who = 0;   // the thread of a write; the lane of a read, or kSeveral
    uint8_t bytes = 0;  // a bit for each of the four
  };
  static constexpr uint16_t kSeveral = 0xFFFF;

  void note_read(Event& event, uint16_t lane, const Time& time, uint8_t bytes, uint32_t site);

  int warps_ = 0;
  uint32_t last_epoch_ = 0;
  std::vector<Event> writes_;  // [cell]
  std::vector<Event> reads_;   // [cell][warp]
};

}  // namespace fastattn::cuda::sim
