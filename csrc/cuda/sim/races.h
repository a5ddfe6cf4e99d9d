// Finds accesses to shared memory that nothing orders: vector clocks of threads, joined by barriers, and for every four
// bytes the last write and each warp's last read (after Flanagan and Freund, "FastTrack", PLDI 2009).
//
// What copies bring is written by agents, one for each mbarrier, which have places in the clocks behind the threads:
// who has waited for a phase knows what its agent wrote.  Reads by copies and products are in async_reads.h.
#pragma once

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace fastattn::cuda::sim {

inline constexpr int kAgents = 32;

// What a thread knows of the others: everything that thread u did in epochs up to known[u] happened before.  Threads
// that met at a barrier share one; each thread's own epoch is kept beside it.
struct Clock {
  std::vector<uint32_t> known;   // threads, then agents
  std::vector<uint32_t> fenced;  // of what is known, the part that a proxy fence has shown to copies and products
  std::vector<uint32_t> known_of_warp;   // the least of a warp's lanes
  std::vector<uint32_t> latest_of_warp;  // and the most
};

// A thread's place in time.
struct Time {
  std::shared_ptr<const Clock> clock;
  uint32_t epoch = 0;
  uint32_t fenced = 0;  // the thread's own last epoch before its last proxy fence
};

struct Conflict {
  bool found = false;
  bool was_write = false;
  bool unfenced = false;  // in order, but with no proxy fence between
  int thread = 0;         // -1: several lanes of the warp; behind the threads: an agent
  int warp = 0;
  uint32_t site = 0;
};

class Races {
 public:
  void begin_block(int threads, size_t shared_bytes, std::vector<Time>& times);

  using Arrivals = std::vector<std::pair<int, Time>>;

  // What those who arrived know together, themselves included; `agent` has written in epochs up to `agent_epoch`.
  std::shared_ptr<const Clock> knowledge_of(const Arrivals& arrived, int agent = 0, uint32_t agent_epoch = 0) const;
  // All those in `arrived` have happened before what each of `waiting` does next.
  void join(const Arrivals& arrived, const int* waiting, int count, std::vector<Time>& times);
  // A thread learns what another one announced.
  void acquire(Time& time, const std::shared_ptr<const Clock>& announced);
  // fence.proxy.async: what the thread did and knows is seen by copies and products that come after.
  void fence(Time& time);
  uint32_t next_epoch() { return ++last_epoch_; }
  // The lanes of a warp go on in a new epoch, because one of them announced something.
  uint32_t advance(Time* times, int count) {
    ++last_epoch_;
    for (int i = 0; i < count; ++i) times[i].epoch = last_epoch_;
    return last_epoch_;
  }

  // Checks and notes an access of `bytes` at offset `at`.  A conflict is returned, not noted.
  Conflict read(int thread, const Time& time, uint32_t at, int bytes, uint32_t site);
  Conflict write(int thread, const Time& time, uint32_t at, int bytes, uint32_t site);
  // A read on behalf of all lanes of a warp that share one time.
  Conflict read_by_warp(int warp, const Time& time, uint32_t at, int bytes, uint32_t site);
  // Only checks that a write now would be in order.
  Conflict check_write(int thread, const Time& time, uint32_t at, int bytes);
  // Checks that `thread` may let a copy read, or overwrite, what threads wrote: they are in order and fenced.
  Conflict check_written(int thread, const Time& time, uint32_t at, int bytes) const;
  // The same for a read by all the threads whose clocks these are.
  Conflict check_written(const Clock* const* clocks, int count, uint32_t at, int bytes) const;
  // Notes what an agent wrote.
  void write_by_agent(int agent, uint32_t epoch, uint32_t at, int bytes, uint32_t site);

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

  // Threads mostly come to a point with the same clocks: the latest results, and what they were made from.
  struct Result {
    std::shared_ptr<const Clock> from, with, clock;
  };
  std::shared_ptr<const Clock> find(const std::vector<Result>& results, const Clock* from, const Clock* with) const;
  static void keep(std::vector<Result>& results, Result result);

  int warps_ = 0, threads_ = 0;
  uint32_t last_epoch_ = 0;
  std::vector<Result> acquired_, fences_;
  std::vector<Event> writes_;  // [cell]
  std::vector<Event> reads_;   // [cell][warp]
  // Whether any thread read one of these cells in this block: most that copies fill are read by products alone.
  static constexpr uint32_t kCellsOfLine = 32;
  std::vector<uint8_t> was_read_;
};

}  // namespace fastattn::cuda::sim
