// mbarriers: objects in shared memory at which threads arrive, at which bytes that copies bring are counted, and whose
// phases threads wait for.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "instructions.h"
#include "races.h"

namespace fastattn::cuda::sim {

struct Mbarrier {
  uint32_t address;
  int agent;         // writes what copies bring
  int initialiser;   // thread
  bool fenced;       // copies may use it
  int arrivals;      // that complete a phase
  int pending;       // of them, still to come
  int64_t bytes;     // announced, and not yet brought; negative: the other way round
  uint64_t phase;    // how many are complete
  uint32_t written;  // the last epoch of the agent
  Races::Arrivals arrived;
  std::shared_ptr<const Clock> announced;  // what those knew who completed the last phase
  std::vector<int> waiting;                // threads
};

// The mbarriers of a block.
class Mbarriers {
 public:
  static constexpr uint32_t kBytes = 8;

  void begin_block() { all_.clear(), made_ = 0; }
  void init(uint32_t address, uint32_t arrivals, Where where);
  void invalidate(uint32_t address, Where where);
  void fence();
  // `bytes` < 0: none are announced.
  void arrive(uint32_t address, int64_t bytes, Where where);
  void expect(uint32_t address, int64_t bytes, Where where);
  // Without `wait_for_ever`, may return before the phase is complete.
  bool wait(uint32_t address, uint32_t parity, bool wait_for_ever, Where where);

  // The running thread may issue a copy that uses it.
  void check_copy(uint32_t address, Where where);
  // A copy that `thread` issued has brought bytes to shared memory.
  void complete(uint32_t address, uint32_t to, int bytes, int thread, uint32_t site);

  // Wakes those who may return without completion; false: there are none.
  bool give_up_waits();
  // At the end of the block: bytes that were announced and did not come, or came and were not announced.
  void check_end();
  std::string text(uint32_t address) const;

 private:
  Mbarrier& at(uint32_t address, const char* what, Where where);
  Mbarrier* find(uint32_t address);
  void complete_phase(Mbarrier& barrier);

  std::vector<std::unique_ptr<Mbarrier>> all_;
  int made_ = 0;
  int fruitless_ = 0;  // rounds of waits given up since the last phase was complete
};

}  // namespace fastattn::cuda::sim
