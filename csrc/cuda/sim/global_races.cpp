#include "global_races.h"

namespace fastattn::cuda::sim {

GlobalRaces::Word& GlobalRaces::word(uintptr_t address) {
  const uintptr_t page = address / kPageBytes;
  if (page != last_page_) {
    auto& words = pages_[page];
    if (!words) words = std::make_unique<Word[]>(kPageBytes / 4);
    last_page_ = page;
    last_words_ = words.get();
  }
  return last_words_[address % kPageBytes / 4];
}

bool GlobalRaces::ordered(const Event& event, const Party& party) {
  if (event.block != party.block || event.several_blocks) return false;
  return event.thread == party.thread || event.epoch <= party.time.clock->known[event.thread];
}

namespace {

// Calls f(address of four bytes, bytes of them) until it returns true.
template <class F>
void for_words(uintptr_t address, int bytes, F f) {
  if (bytes < 4) {
    f(address & ~uintptr_t{3}, static_cast<uint8_t>(((1u << bytes) - 1u) << (address % 4)));
    return;
  }
  for (uintptr_t end = address + static_cast<uintptr_t>(bytes); address < end; address += 4) {
    if (f(address, uint8_t{15})) return;
  }
}

}  // namespace

GlobalRaces::Conflict GlobalRaces::read(const Party& party, uintptr_t address, int bytes) {
  Conflict conflict;
  for_words(address, bytes, [&](uintptr_t at, uint8_t mask) {
    Word& word = this->word(at);
    const Event& write = word.write;
    if ((write.bytes & mask) != 0 && !ordered(write, party)) {
      conflict = {true, true, write.block, write.several_blocks, write.thread, write.site};
      return true;
    }
    Event& read = word.read;
    const bool several = (read.bytes & mask) != 0 && (read.several_blocks || read.block != party.block);
    read = {party.block, party.time.epoch, party.site, static_cast<uint16_t>(party.thread), mask, several, false};
    return false;
  });
  return conflict;
}

GlobalRaces::Conflict GlobalRaces::write(const Party& party, uintptr_t address, int bytes, bool atomic) {
  Conflict conflict;
  for_words(address, bytes, [&](uintptr_t at, uint8_t mask) {
    Word& word = this->word(at);
    for (const Event* event : {&word.write, &word.read}) {
      if ((event->bytes & mask) != 0 && !(atomic && event->atomic) && !ordered(*event, party)) {
        conflict = {true, event == &word.write, event->block, event->several_blocks, event->thread, event->site};
        return true;
      }
    }
    Event& write = word.write;
    const bool several = atomic && write.atomic && (write.several_blocks || write.block != party.block);
    write = {party.block, party.time.epoch, party.site, static_cast<uint16_t>(party.thread), mask, several, atomic};
    return false;
  });
  return conflict;
}

}  // namespace fastattn::cuda::sim
