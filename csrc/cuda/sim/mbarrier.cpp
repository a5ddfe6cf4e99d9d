#include "mbarrier.h"

#include <algorithm>

#include "block.h"
#include "sites.h"

namespace fastattn::cuda::sim {

namespace {

constexpr int64_t kMostArrivals = (1 << 20) - 1, kMostBytes = (1 << 20) - 1;

}  // namespace

Mbarrier* Mbarriers::find(uint32_t address) {
  for (const auto& barrier : all_) {
    if (barrier->address == address) return barrier.get();
  }
  return nullptr;
}

// The barrier at `address`, whose initialisation the running thread knows of.
Mbarrier& Mbarriers::at(uint32_t address, const char* what, Where where) {
  const int thread = current_position.thread;
  block.check_shared(thread, address, kBytes, what, where);
  Mbarrier* barrier = find(address);
  if (barrier == nullptr) {
    block.fail(where, std::string(what) + " at " + shared_text(address, kBytes) + ", where no mbarrier is initialised");
  }
  if (block.find_races()) {
    block.check_race(
        thread, block.races().read(thread, block.time(thread), address - kSharedBase, kBytes, Sites::number(where)),
        address, kBytes, what, where);
  }
  return *barrier;
}

void Mbarriers::init(uint32_t address, uint32_t arrivals, Where where) {
  const int thread = current_position.thread;
  block.check_shared(thread, address, kBytes, "mbarrier_init", where);
  if (find(address) != nullptr) {
    block.fail(where, "mbarrier_init of " + text(address) + ", which is initialised already");
  }
  if (arrivals < 1 || arrivals > kMostArrivals) {
    block.fail(where, "mbarrier_init for " + std::to_string(arrivals) + " arrivals, not 1 to 2^20 - 1");
  }
  block.begin_write(thread, address, kBytes, "mbarrier_init", where);
  block.mark(address, kBytes, kMbarrier);
  const int count = static_cast<int>(arrivals);
  all_.push_back(std::make_unique<Mbarrier>(
      Mbarrier{address, made_++ % kAgents, thread, false, count, count, 0, 0, 0, {}, nullptr, {}}));
}

void Mbarriers::invalidate(uint32_t address, Where where) {
  Mbarrier& barrier = at(address, "mbarrier_invalidate", where);
  if (!barrier.waiting.empty()) {
    block.fail(where,
               "mbarrier_invalidate of " + text(address) + ", where " + block.name(barrier.waiting.front()) + " waits");
  }
  const int thread = current_position.thread;
  block.mark(address, kBytes, kUnwritten);
  block.begin_write(thread, address, kBytes, "mbarrier_invalidate", where);
  std::erase_if(all_, [&](const auto& other) { return other.get() == &barrier; });
}

void Mbarriers::fence() {
  for (const auto& barrier : all_) {
    if (barrier->initialiser == current_position.thread) barrier->fenced = true;
  }
}

void Mbarriers::arrive(uint32_t address, int64_t bytes, Where where) {
  Mbarrier& barrier = at(address, "mbarrier_arrive", where);
  if (bytes >= 0) expect(address, bytes, where);
  if (barrier.pending == 0) {
    block.fail(where, "mbarrier_arrive at " + text(address) + ": one more than the " +
                          std::to_string(barrier.arrivals) + " arrivals that it was initialised for");
  }
  --barrier.pending;
  if (block.find_races()) {
    const int thread = current_position.thread;
    barrier.arrived.emplace_back(thread, block.time(thread));
    block.advance_warp();
  }
  complete_phase(barrier);
}

void Mbarriers::expect(uint32_t address, int64_t bytes, Where where) {
  Mbarrier& barrier = at(address, "mbarrier_expect", where);
  barrier.bytes += bytes;
  if (bytes > kMostBytes || barrier.bytes > kMostBytes) {
    block.fail(where, "mbarrier_expect of " + std::to_string(bytes) + " bytes at " + text(address) +
                          ": more than 2^20 - 1 are awaited");
  }
}

bool Mbarriers::wait(uint32_t address, uint32_t parity, bool wait_for_ever, Where where) {
  Mbarrier& barrier = at(address, "mbarrier_wait", where);
  const int index = current_position.thread;
  if (parity > 1) block.fail(where, "mbarrier_wait for parity " + std::to_string(parity) + ", not 0 or 1");
  if ((barrier.phase & 1) != parity) {  // the phase before the current one has this parity
    if (block.find_races()) block.races().acquire(block.time(index), barrier.announced);
    return true;
  }
  Thread& thread = block.self();
  thread.wait = {address, parity, wait_for_ever, false, Sites::number(where)};
  barrier.waiting.push_back(index);
  block.suspend();
  const bool complete = thread.wait.complete;
  thread.wait = {};
  return complete;
}

void Mbarriers::complete_phase(Mbarrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  if (block.find_races()) {
    barrier.announced = block.races().knowledge_of(barrier.arrived, barrier.agent, barrier.written);
    barrier.arrived.clear();
  }
  const uint32_t parity = barrier.phase & 1;
  ++barrier.phase;
  barrier.pending = barrier.arrivals;
  fruitless_ = 0;
  std::erase_if(barrier.waiting, [&](int index) {
    Thread& thread = block.thread(index);
    if (thread.wait.parity != parity) return false;
    thread.wait.complete = true;
    if (block.find_races()) block.races().acquire(block.time(index), barrier.announced);
    block.wake(index);
    return true;
  });
}

void Mbarriers::check_copy(uint32_t address, Where where) {
  const Mbarrier& barrier = at(address, "a copy's mbarrier", where);
  if (!barrier.fenced) {
    block.fail(where, "a copy uses " + text(address) + " without mbarrier_init_fence between, by " +
                          block.name(barrier.initialiser) + ", which initialised it");
  }
}

void Mbarriers::complete(uint32_t address, uint32_t to, int bytes, int thread, uint32_t site) {
  Mbarrier* barrier = find(address);
  const Where where = Sites::location(site);
  if (barrier == nullptr) {
    block.fail(thread, where, "a copy arrives, and the mbarrier at " + shared_text(address, kBytes) + " is gone");
  }
  if (block.find_races()) {
    barrier->written = block.races().next_epoch();
    block.races().write_by_agent(barrier->agent, barrier->written, to - kSharedBase, bytes, site);
  }
  barrier->bytes -= bytes;
  if (barrier->bytes < -kMostBytes) {
    block.fail(thread, where, "a copy brings more bytes than were announced: " + text(address));
  }
  complete_phase(*barrier);
}

bool Mbarriers::give_up_waits() {
  constexpr int kPatience = 1000;
  if (++fruitless_ > kPatience) return false;
  bool any = false;
  for (const auto& barrier : all_) {
    std::erase_if(barrier->waiting, [&](int index) {
      if (block.thread(index).wait.for_ever) return false;
      block.wake(index);
      return any = true;
    });
  }
  return any;
}

void Mbarriers::check_end() {
  for (const auto& barrier : all_) {
    if (barrier->bytes == 0) continue;
    block.fail_block("ended with " + text(barrier->address));
  }
}

std::string Mbarriers::text(uint32_t address) const {
  const auto found = std::find_if(all_.begin(), all_.end(), [&](const auto& b) { return b->address == address; });
  const std::string name = "the mbarrier at shared_base() + " + std::to_string(int64_t{address} - kSharedBase);
  if (found == all_.end()) return name;
  const Mbarrier& barrier = **found;
  std::string text = name + " (in phase " + std::to_string(barrier.phase) + ", " +
                     std::to_string(barrier.arrivals - barrier.pending) + " of " + std::to_string(barrier.arrivals) +
                     " arrived";
  if (barrier.bytes > 0) text += ", " + std::to_string(barrier.bytes) + " bytes announced that have not come";
  if (barrier.bytes < 0) text += ", " + std::to_string(-barrier.bytes) + " bytes came that were not announced";
  return text + ")";
}

// ---- The instructions.

void mbarrier_init(uint32_t barrier, uint32_t arrivals, Where where) {
  block.mbarriers().init(barrier, arrivals, where);
}
void mbarrier_init_fence(Where) { block.mbarriers().fence(); }
void mbarrier_invalidate(uint32_t barrier, Where where) { block.mbarriers().invalidate(barrier, where); }
void mbarrier_arrive(uint32_t barrier, Where where) { block.mbarriers().arrive(barrier, -1, where); }
void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes, Where where) {
  block.mbarriers().arrive(barrier, bytes, where);
}
void mbarrier_expect(uint32_t barrier, uint32_t bytes, Where where) { block.mbarriers().expect(barrier, bytes, where); }
bool mbarrier_try_wait(uint32_t barrier, uint32_t parity, Where where) {
  return block.mbarriers().wait(barrier, parity, /*wait_for_ever=*/false, where);
}
void mbarrier_wait(uint32_t barrier, uint32_t parity, Where where) {
  block.mbarriers().wait(barrier, parity, /*wait_for_ever=*/true, where);
}

}  // namespace fastattn::cuda::sim
