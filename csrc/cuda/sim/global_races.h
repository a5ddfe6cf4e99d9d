// Finds accesses to global memory that nothing orders.  Blocks of one launch run at the same time on a chip: a number
// that one of them stores and another loads or stores, other than by atomics, is a race, although the simulator, which
// runs them in turn, would give the same result every time.  Within a block, barriers order global memory as they do
// shared.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>

#include "races.h"

namespace fastattn::cuda::sim {

class GlobalRaces {
 public:
  // Who accesses: a thread of a block, the latter counted along the grid.
  struct Party {
    uint32_t block;
    int thread;
    const Time& time;
    uint32_t site;
  };
  struct Conflict {
    bool found = false;
    bool was_write = false;
    uint32_t block = 0;
    bool several_blocks = false;  // `block` is one of them
    int thread = 0;
    uint32_t site = 0;
  };

  void begin_launch() { pages_.clear(), last_page_ = ~uintptr_t{0}; }
  Conflict read(const Party& party, uintptr_t address, int bytes);
  Conflict write(const Party& party, uintptr_t address, int bytes, bool atomic);

 private:
  // The last of the writes, or of the reads, of four bytes.
  struct Event {
    uint32_t block = 0;
    uint32_t epoch = 0;  // 0: none
    uint32_t site = 0;
    uint16_t thread = 0;
    uint8_t bytes = 0;  // a bit for each of the four
    bool several_blocks = false;
    bool atomic = false;
  };
  struct Word {
    Event write, read;
  };
  static constexpr uintptr_t kPageBytes = 4096;

  Word& word(uintptr_t address);
  static bool ordered(const Event& event, const Party& party);

  std::unordered_map<uintptr_t, std::unique_ptr<Word[]>> pages_;
  uintptr_t last_page_ = ~uintptr_t{0};
  Word* last_words_ = nullptr;
};

}  // namespace fastattn::cuda::sim
