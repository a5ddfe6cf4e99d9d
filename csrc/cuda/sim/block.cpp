#include "block.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>

#include "numbers.h"
#include "sites.h"

namespace fastattn::cuda::sim {

Block block;
Position current_position;

namespace {

constexpr uint8_t kPoison = 0xFF;  // NaN in float32, float16 and bfloat16

bool same_place(Where a, Where b) {
  return std::bit_cast<uintptr_t>(a) == std::bit_cast<uintptr_t>(b) || Sites::number(a) == Sites::number(b);
}

}  // namespace

const char* operation_name(Operation operation) {
  switch (operation) {
    case Operation::kShuffle:
      return "a shuffle";
    case Operation::kVote:
      return "a vote";
    case Operation::kSyncWarp:
      return "sync_warp";
    case Operation::kLoadMatrix:
      return "load_matrix";
    case Operation::kStoreMatrix:
      return "store_matrix";
    case Operation::kMultiply:
      return "multiply";
    case Operation::kSyncBlock:
      return "sync_block";
    case Operation::kBarrierSync:
      return "named_barrier_sync";
    case Operation::kBarrierArrive:
      return "named_barrier_arrive";
    case Operation::kElect:
      return "elect_one";
    case Operation::kWarpgroupMultiply:
      return "a product of warpgroups";
    case Operation::kWarpgroupFence:
      return "warpgroup_fence";
    case Operation::kWarpgroupCommit:
      return "warpgroup_commit";
    case Operation::kWarpgroupWait:
      return "warpgroup_wait";
    case Operation::kRegisters:
      return "registers_increase or registers_decrease";
  }
  return "?";
}

std::string lanes_text(uint32_t lanes) {
  std::string text = std::has_single_bit(lanes) ? "lane " : "lanes ";
  for (int first = 0; first < kLanes;) {
    if ((lanes >> first & 1) == 0) {
      ++first;
      continue;
    }
    int last = first;
    while (last + 1 < kLanes && (lanes >> (last + 1) & 1) != 0) ++last;
    if (text.back() != ' ') text += ", ";
    text += std::to_string(first);
    if (last != first) text += "-" + std::to_string(last);
    first = last + 1;
  }
  return text;
}

std::string shared_text(uint32_t address, int bytes) {
  const int64_t offset = int64_t{address} - kSharedBase;
  return std::to_string(bytes) + (bytes == 1 ? " byte" : " bytes") + " at shared_base() " + (offset < 0 ? "- " : "+ ") +
         std::to_string(offset < 0 ? -offset : offset);
}

// ---- Scheduling.  A warp's lanes run until they wait or end; then the next warp's.

void Block::thread_main() {
  try {
    block.body_(block.params_);
    block.exit_thread();
  } catch (...) {
    block.error_ = std::current_exception();
  }
  // Outside the handler: a fiber must not be left while it handles an exception.
  Thread& self = block.self();
  Thread* next = block.error_ ? nullptr : block.next_to_run();
  if (next != nullptr) current_position.thread = next->index;
  Fiber::jump(self.fiber, next != nullptr ? next->fiber : block.main_);
  std::terminate();  // a thread that ended was woken
}

Thread* Block::next_ready() {
  if (in_random_order_) running_warp_ = random(warps_.size());
  for (size_t i = 0; i < warps_.size(); ++i) {
    const size_t w = running_warp_ + i < warps_.size() ? running_warp_ + i : running_warp_ + i - warps_.size();
    Warp& warp = warps_[w];
    if (warp.ready == 0) continue;
    running_warp_ = w;
    const int lane = std::countr_zero(warp.ready);
    warp.ready &= ~(1u << lane);
    return &threads_[w * kLanes + static_cast<size_t>(lane)];
  }
  return nullptr;
}

// Where nobody can go on, something arrives that somebody may wait for.
Thread* Block::next_to_run() {
  try {
    for (;;) {
      if (in_random_order_ && !all_exited() && random(8) == 0) transfers_.arrive();
      if (Thread* next = next_ready()) return next;
      if (all_exited()) return nullptr;
      if (!transfers_.arrive() && !mbarriers_.give_up_waits()) return nullptr;
    }
  } catch (...) {  // not thrown here: this may be anyone's stack
    error_ = std::current_exception();
    return nullptr;
  }
}

void Block::suspend() {
  Thread& self = this->self();
  const int index = current_position.thread;
  Thread* next = next_to_run();
  if (next == &self) return;  // what arrived is what it waits for
  if (next != nullptr) current_position.thread = next->index;
  Fiber::jump(self.fiber, next != nullptr ? next->fiber : main_);
  current_position.thread = index;
}

void Block::run(const char* kernel, int threads, const Launch& launch, const int (&index)[3], const void* params,
                void (*body)(const void*)) {
  kernel_ = kernel;
  params_ = params;
  body_ = body;
  error_ = nullptr;
  thread_count_ = threads;
  current_position = {0, threads, {index[0], index[1], index[2]}, {launch.grid_x, launch.grid_y, launch.grid_z}};

  if (threads_.size() < static_cast<size_t>(threads)) {
    std::vector<Thread> more(static_cast<size_t>(threads));
    for (int i = 0; i < threads; ++i) {
      more[static_cast<size_t>(i)].index = i;
      more[static_cast<size_t>(i)].fiber.allocate(i);
    }
    threads_.swap(more);
  }
  for (int i = 0; i < threads; ++i) {
    Thread& thread = threads_[static_cast<size_t>(i)];
    thread.copies.clear();
    thread.copy_groups.clear();
    thread.uncommitted = 0;
    thread.outgoing = {};
    thread.wait = {};
    thread.fiber.prepare(thread_main);
  }
  warps_.resize(static_cast<size_t>(threads / kLanes));
  for (Warp& warp : warps_) {
    warp.ready = kAllLanes;
    warp.arrived = warp.exited = 0;
    warp.at_barrier = -1;
    warp.registers = launch_registers_;
    warp.registers_set = false;
    warp.wanted_registers = 0;
  }
  running_warp_ = 0;
  free_registers_ = 0;
  warpgroups_.clear();
  for (int warp = 0; warp < threads / kLanes; warp += kWarpsOfGroup) warpgroups_.emplace_back(warp);
  for (Barrier& barrier : barriers_) barrier = Barrier{};

  const auto shared_bytes = static_cast<size_t>(launch.shared_bytes);
  bytes_.assign(shared_bytes, kPoison);
  states_.assign(shared_bytes, kUnwritten);
  if (find_races_) races_.begin_block(threads, shared_bytes, times_);
  async_reads_.begin_block(threads, shared_bytes);
  mbarriers_.begin_block();
  transfers_.begin_block();

  Thread* first = next_ready();
  current_position.thread = first->index;
  Fiber::jump(main_, first->fiber);

  // Back here: everything has ended, something threw, or nobody can go on.
  for (Warp& warp : warps_) warp.requests.flush(traffics_);
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  if (!all_exited()) deadlock();
  check_registers();
  transfers_.end_block();
  mbarriers_.check_end();
}

bool Block::all_exited() const {
  return std::all_of(warps_.begin(), warps_.end(), [](const Warp& warp) { return warp.exited == kAllLanes; });
}

void Block::exit_thread() {
  Warp& warp = this->warp();
  const uint32_t bit = 1u << current_position.thread % kLanes;
  warp.exited |= bit;
  if (!self().outgoing.empty()) transfers_.check_exit();
  warpgroup().check_exit(current_position.thread / kLanes, warp.where);
  if (warp.arrived != 0) {
    fail(warp.where, "divergent warp: " + lanes_text(warp.arrived) + " wait at " + operation_name(warp.operation) +
                         " (" + Sites::text(warp.where) + "), this thread has exited");
  }
}

// ---- Meetings of a warp.

bool Block::arrive(Warp& warp, Operation operation, int parameter, Where where, void* arguments) {
  const int lane = current_position.thread % kLanes;
  if (warp.arrived == 0) {
    warp.operation = operation;
    warp.parameter = parameter;
    warp.where = where;
    if (warp.exited != 0) [[unlikely]] {
      fail(where, std::string("divergent warp: this thread is at ") + operation_name(operation) + ", " +
                      lanes_text(warp.exited) + " of its warp exited");
    }
  } else if (warp.operation != operation || warp.parameter != parameter || !same_place(warp.where, where))
      [[unlikely]] {
    diverged(warp, operation_name(operation), where);
  }
  warp.arguments[lane] = arguments;
  warp.arrived |= 1u << lane;
  return warp.arrived == kAllLanes;
}

void Block::release(Warp& warp) {
  warp.arrived = 0;
  resume_other_lanes(warp);
  if (count_) warp.requests.flush(traffics_);
}

void Block::diverged(Warp& warp, const std::string& newcomer, Where where) {
  fail(where, "divergent warp: this thread is at " + newcomer + " (" + Sites::text(where) + "), " +
                  lanes_text(warp.arrived) + " wait at " + operation_name(warp.operation) + " (" +
                  Sites::text(warp.where) + ")");
}

// ---- Meetings of a warpgroup.

bool Block::all_warps_arrived() {
  const int first = current_position.thread / kGroupThreads * kGroupThreads;
  Warp& mine = warp();
  if (first + kGroupThreads > thread_count_) {
    fail(mine.where, std::string(operation_name(mine.operation)) + ": the block ends before its warpgroup is complete");
  }
  bool all = true;
  for (int thread = first; thread < first + kGroupThreads; thread += kLanes) {
    const Warp& other = warp_of(thread);
    if (other.arrived != kAllLanes) {
      all = false;
    } else if (other.parameter != mine.parameter || !same_place(other.where, mine.where)) {
      fail(mine.where, "divergent warpgroup: this warp is at " + std::string(operation_name(mine.operation)) +
                           ", warp " + std::to_string(thread / kLanes) + " waits at " +
                           operation_name(other.operation) + " (" + Sites::text(other.where) + ")");
    }
  }
  return all;
}

void Block::collect_arguments(void* (&all)[kGroupThreads]) {
  const int first = current_position.thread / kGroupThreads * kGroupThreads;
  for (int i = 0; i < kGroupThreads; ++i) all[i] = warp_of(first + i).arguments[i % kLanes];
}

void Block::release_warpgroup() {
  const int first = current_position.thread / kGroupThreads * kGroupThreads;
  Warp& mine = warp();
  for (int thread = first; thread < first + kGroupThreads; thread += kLanes) {
    Warp& other = warp_of(thread);
    if (&other == &mine) continue;
    other.arrived = 0;
    other.ready = kAllLanes;
    if (count_) other.requests.flush(traffics_);
  }
  release(mine);
}

// ---- setmaxnreg.  A warp gives registers back to the block's pool, or waits until the pool has what it asks for.

void Block::set_registers(int count, bool increase, Where where) {
  Warp& warp = this->warp();
  int nothing = 0;
  if (!arrive(warp, Operation::kRegisters, count, where, &nothing)) return suspend();
  warp.arrived = 0;
  const auto refuse = [&](const char* name) {
    fail(where,
         std::string(name) + " to " + std::to_string(count) + ", where the warp has " + std::to_string(warp.registers));
  };
  // What a thread begins with is for the compiler to say; here it is the most that the launch allows.
  if (increase && warp.registers_set && count < warp.registers) refuse("registers_increase");
  if (!increase && count > warp.registers) refuse("registers_decrease");
  const bool keeps = increase && count <= warp.registers;
  warp.registers_set = true;
  warp.wait_where = where;
  warp.wanted_registers = keeps ? 0 : count;
  if (!keeps) grant_registers();
  if (warp.wanted_registers != 0) return suspend();
  resume_other_lanes(warp);
}

// At the end: all warps of a warpgroup must have made the same changes.
void Block::check_registers() const {
  for (size_t w = 0; w < warps_.size(); ++w) {
    const size_t first = w / kWarpsOfGroup * kWarpsOfGroup;
    if (warps_[w].registers == warps_[first].registers) continue;
    fail_block("warps of one warpgroup have different numbers of registers: warp " + std::to_string(w) + " " +
               std::to_string(warps_[w].registers) + ", warp " + std::to_string(first) + " " +
               std::to_string(warps_[first].registers));
  }
}

void Block::grant_registers() {
  for (bool changed = true; std::exchange(changed, false);) {
    for (Warp& warp : warps_) {
      const int more = (warp.wanted_registers - warp.registers) * kLanes;
      if (warp.wanted_registers == 0 || more > free_registers_) continue;
      free_registers_ -= more;
      warp.registers = std::exchange(warp.wanted_registers, 0);
      if (&warp != &this->warp()) warp.ready = kAllLanes;
      changed = true;
    }
  }
}

void Block::sync_warp(Where where) {
  int nothing = 0;
  meet(Operation::kSyncWarp, 0, where, nothing, [&](void**) {
    ++report_.warp_barriers;
    if (!find_races_) return;
    const int first = current_position.thread / kLanes * kLanes;
    std::vector<std::pair<int, Time>> arrived;
    int lanes[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = first + lane;
      arrived.emplace_back(first + lane, time(first + lane));
    }
    races_.join(arrived, lanes, kLanes, times_);
  });
}

// ---- Barriers of the block.  A warp arrives as a whole, as bar.sync and __syncthreads ask.

void Block::barrier(Operation operation, int id, int threads, bool predicate, Where where, int* predicates) {
  BarrierCall mine{predicate, threads, 0};
  const bool waits = operation != Operation::kBarrierArrive;
  Warp& warp = this->warp();
  if (!arrive(warp, operation, id, where, &mine)) {
    suspend();
  } else {
    enter_barrier(warp, id, waits, where);
    Barrier& barrier = barriers_[id];
    if (barrier.arrived == barrier.expected) {
      complete_barrier(barrier);
      resume_other_lanes(warp);
    } else if (!waits) {
      resume_other_lanes(warp);
    } else {
      warp.at_barrier = id;
      warp.wait_where = where;
      suspend();
    }
  }
  if (predicates != nullptr) *predicates = mine.predicates;
}

// The running thread is the last of its warp.
void Block::enter_barrier(Warp& warp, int id, bool waits, Where where) {
  warp.arrived = 0;
  ++report_.block_barriers;
  if (count_) warp.requests.flush(traffics_);
  if (id < 0 || id >= kNamedBarriers) fail(where, "barrier " + std::to_string(id) + " of 0 to 15");
  Barrier& barrier = barriers_[id];
  const int first = current_position.thread / kLanes * kLanes;
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& call = *static_cast<const BarrierCall*>(warp.arguments[lane]);
    const auto what = [&] {
      return "barrier " + std::to_string(id) + " for " + std::to_string(call.threads) + " threads";
    };
    if (call.threads <= 0 || call.threads % kLanes != 0 || call.threads > thread_count_) {
      fail(first + lane, where, what() + ": not a multiple of 32 up to the block's " + std::to_string(thread_count_));
    }
    if (barrier.expected == 0) barrier.expected = call.threads;
    if (call.threads != barrier.expected) {
      fail(first + lane, where, what() + ", where others came for " + std::to_string(barrier.expected));
    }
    ++barrier.arrived;
    barrier.predicates += call.predicate;
    if (find_races_) barrier.announcements.emplace_back(first + lane, time(first + lane));
    if (waits) barrier.waiting.push_back(first + lane);
  }
  if (find_races_ && !waits) races_.advance(&times_[static_cast<size_t>(first)], kLanes);
}

void Block::complete_barrier(Barrier& barrier) {
  const Barrier complete = std::exchange(barrier, Barrier{});
  if (find_races_) {
    races_.join(complete.announcements, complete.waiting.data(), static_cast<int>(complete.waiting.size()), times_);
  }
  for (const int thread : complete.waiting) {
    Warp& warp = warp_of(thread);
    static_cast<BarrierCall*>(warp.arguments[thread % kLanes])->predicates = complete.predicates;
    warp.ready |= 1u << thread % kLanes;
    warp.at_barrier = -1;
  }
}

// ---- Errors.

std::string Block::name(int thread) const {
  return "thread " + std::to_string(thread) + " (warp " + std::to_string(thread / kLanes) + ", lane " +
         std::to_string(thread % kLanes) + ")";
}

std::string Block::block_text(uint32_t linear) const {
  const auto x = static_cast<uint32_t>(current_position.grid[0]), y = static_cast<uint32_t>(current_position.grid[1]);
  return "block (" + std::to_string(linear % x) + ", " + std::to_string(linear / x % y) + ", " +
         std::to_string(linear / x / y) + ")";
}

void Block::fail(int thread, Where where, const std::string& message) {
  throw std::runtime_error("simulated kernel " + std::string(kernel_) + ", " + block_text(linear_index()) + ", " +
                           name(thread) + ", " + Sites::text(where) + ": " + message);
}

void Block::check_arrived(const void* numbers, int bytes, const char* what, Where where) {
  for (int at = 0; at + 4 <= bytes; at += 4) {
    uint32_t bits;
    std::memcpy(&bits, static_cast<const char*>(numbers) + at, 4);
    if (is_in_flight(bits)) [[unlikely]] {
      fail(where, std::string(what) + " of a number that depends on an accumulator whose product was not waited for");
    }
  }
}

void Block::fail_block(const std::string& message) const {
  throw std::runtime_error("simulated kernel " + std::string(kernel_) + ", " + block_text(linear_index()) + ": " +
                           message);
}

std::string Block::waits_of(Warp& warp, int lane) const {
  const uint32_t bit = 1u << lane;
  const MbarrierWait& wait =
      threads_[static_cast<size_t>(&warp - warps_.data()) * kLanes + static_cast<size_t>(lane)].wait;
  if (wait.address != 0) {
    return "wait for parity " + std::to_string(wait.parity) + " (" + Sites::text(Sites::location(wait.site)) + ") of " +
           mbarriers_.text(wait.address);
  }
  if ((warp.exited & bit) != 0) return "exited";
  if (warp.arrived == kAllLanes) {
    return std::string("wait for the rest of their warpgroup at ") + operation_name(warp.operation) + " (" +
           Sites::text(warp.where) + ")";
  }
  if ((warp.arrived & bit) != 0) {
    return std::string("wait for the rest of their warp at ") + operation_name(warp.operation) + " (" +
           Sites::text(warp.where) + ")";
  }
  if (warp.wanted_registers != 0) {
    return "wait for " + std::to_string(warp.wanted_registers) + " registers (" + Sites::text(warp.wait_where) +
           "), where they have " + std::to_string(warp.registers) + " and the block's pool has " +
           std::to_string(free_registers_);
  }
  if (warp.at_barrier >= 0) {
    const Barrier& barrier = barriers_[warp.at_barrier];
    return "wait at barrier " + std::to_string(warp.at_barrier) + " (" + Sites::text(warp.wait_where) + "), where " +
           std::to_string(barrier.arrived) + " of " + std::to_string(barrier.expected) + " threads have arrived";
  }
  return "can run";
}

void Block::deadlock() {
  std::string text;
  for (int first = 0; first < thread_count_;) {
    const std::string what = waits_of(warp_of(first), first % kLanes);
    int last = first;
    while (last + 1 < thread_count_ && waits_of(warp_of(last + 1), (last + 1) % kLanes) == what) ++last;
    text += (text.empty() ? "" : "; ") + std::string("threads ") + std::to_string(first) + "-" + std::to_string(last) +
            " " + what;
    first = last + 1;
  }
  fail_block("deadlock: " + text);
}

// ---- Shared memory.

void Block::check_shared(int thread, uint32_t address, int bytes, const char* what, Where where) {
  if (address % static_cast<uint32_t>(bytes) != 0) [[unlikely]] {
    fail(thread, where, std::string("misaligned ") + what + " of " + shared_text(address, bytes));
  }
  check_bounds(thread, address, bytes, what, where);
}

void Block::check_bounds(int thread, uint32_t address, int bytes, const char* what, Where where) {
  if (address < kSharedBase || size_t{address} + static_cast<size_t>(bytes) > kSharedBase + bytes_.size())
      [[unlikely]] {
    fail(thread, where,
         std::string(what) + " of " + shared_text(address, bytes) + " is outside the block's " +
             std::to_string(bytes_.size()) + " bytes");
  }
}

namespace {

// Whether all bytes have the state.
bool all_are(const uint8_t* states, int bytes, uint8_t state) {
  const uint64_t wanted = 0x0101010101010101u * state;
  if (bytes > 16) return std::count(states, states + bytes, state) == bytes;
  uint64_t a = wanted, b = wanted;
  std::memcpy(&a, states, static_cast<size_t>(std::min(bytes, 8)));
  if (bytes == 16) std::memcpy(&b, states + 8, 8);
  return a == wanted && b == wanted;
}

// Whether a copy is to come to any of the bytes, or an mbarrier is there.
bool any_is_reserved(const uint8_t* states, int bytes) {
  if (bytes > 16) return std::any_of(states, states + bytes, [](uint8_t state) { return state >= kInFlight; });
  uint64_t a = 0, b = 0;
  std::memcpy(&a, states, static_cast<size_t>(std::min(bytes, 8)));
  if (bytes == 16) std::memcpy(&b, states + 8, 8);
  return ((a | b) & 0x0202020202020202u) != 0;
}

}  // namespace

void Block::check_readable(int thread, uint32_t address, int bytes, const char* what, Where where) {
  const uint8_t* states = &states_[address - kSharedBase];
  if (all_are(states, bytes, kWritten)) return;
  check_no_copy(thread, address, bytes, what, where);
  if (std::find(states, states + bytes, uint8_t{kMbarrier}) != states + bytes) {
    fail(thread, where, std::string(what) + " of " + shared_text(address, bytes) + ", where an mbarrier is");
  }
  const auto first = std::find(states, states + bytes, uint8_t{kUnwritten}) - states;
  fail(thread, where,
       std::string(what) + " of " + shared_text(address, bytes) + ": byte " + std::to_string(first) +
           " of them was never written");
}

void Block::check_no_copy(int thread, uint32_t address, int bytes, const char* what, Where where) {
  const uint8_t* states = &states_[address - kSharedBase];
  if (std::find(states, states + bytes, uint8_t{kInFlight}) == states + bytes) return;
  for (int other = 0; other < thread_count_; ++other) {
    for (const PendingCopy& copy : threads_[static_cast<size_t>(other)].copies) {
      if (copy.to < address + static_cast<uint32_t>(bytes) && address < copy.to + static_cast<uint32_t>(copy.bytes)) {
        fail(thread, where,
             std::string(what) + " of " + shared_text(address, bytes) +
                 ", where an asynchronous copy is under way that " + name(other) + " issued at " +
                 Sites::text(Sites::location(copy.site)) + " and has not waited for");
      }
    }
  }
  uint32_t site = 0;
  if (int other; transfers_.find_load(address, bytes, other, site)) {
    fail(thread, where,
         std::string(what) + " of " + shared_text(address, bytes) + ", where a tensor copy is under way that " +
             name(other) + " issued at " + Sites::text(Sites::location(site)) +
             " and whose mbarrier has not completed");
  }
}

void Block::check_write(int thread, uint32_t address, int bytes, const char* what, Where where) {
  const uint8_t* states = &states_[address - kSharedBase];
  if (any_is_reserved(states, bytes)) [[unlikely]] {
    check_no_copy(thread, address, bytes, what, where);
    fail(thread, where, std::string(what) + " of " + shared_text(address, bytes) + ", where an mbarrier is");
  }
  const Clock* clock = find_races_ ? time(thread).clock.get() : nullptr;
  const AsyncReads::Read* read = async_reads_.find(thread, clock, address - kSharedBase, bytes);
  if (read == nullptr) return;
  const std::string reader = read->thread >= 0 ? "a store to global memory by " + name(read->thread)
                                               : "a product of warps " + std::to_string(read->first_warp) + "-" +
                                                     std::to_string(read->first_warp + AsyncReads::kParts - 1);
  fail(thread, where,
       std::string(async_reads_.is_under_way(*read) ? "" : "race: ") + what + " of " + shared_text(address, bytes) +
           (async_reads_.is_under_way(*read) ? ", which " : " is not ordered after the wait for ") + reader + " at " +
           Sites::text(Sites::location(read->site)) + (async_reads_.is_under_way(*read) ? " is still reading" : ""));
}

void Block::begin_write(int thread, uint32_t address, int bytes, const char* what, Where where) {
  check_write(thread, address, bytes, what, where);
  if (!find_races_) return;
  check_race(thread, races_.write(thread, time(thread), address - kSharedBase, bytes, Sites::number(where)), address,
             bytes, what, where);
}

void Block::mark(uint32_t address, int bytes, ByteState state) {
  std::memset(&states_[address - kSharedBase], state, static_cast<size_t>(bytes));
}

void Block::race_error(int thread, const Conflict& conflict, uint32_t address, int bytes, const char* what,
                       Where where) {
  const std::string other = conflict.thread >= thread_count_ ? "a tensor copy"
                            : conflict.thread >= 0           ? name(conflict.thread)
                                                             : "warp " + std::to_string(conflict.warp);
  if (conflict.unfenced) {
    fail(thread, where,
         std::string("missing fence_async_shared: ") + what + " of " + shared_text(address, bytes) + ", which " +
             other + " wrote at " + Sites::text(Sites::location(conflict.site)) + " with no proxy fence since");
  }
  fail(thread, where,
       std::string("race: ") + what + " of " + shared_text(address, bytes) + " is not ordered after the " +
           (conflict.was_write ? "write by " : "read by ") + other + " at " +
           Sites::text(Sites::location(conflict.site)));
}

// ---- Launches.

void Block::begin_launch(const char* kernel, int threads, int min_blocks, const Launch& launch) {
  constexpr int kRegisters = 65536, kMost = 240;
  launch_registers_ = std::min(kMost, kRegisters / (threads * min_blocks) / 8 * 8);
  report_ = Report{};
  report_.kernel = kernel;
  report_.grid[0] = launch.grid_x, report_.grid[1] = launch.grid_y, report_.grid[2] = launch.grid_z;
  report_.threads = threads;
  report_.shared_bytes = launch.shared_bytes;
  find_races_ = options().races;
  count_ = options().counters;
  global_races_.begin_launch();
  in_random_order_ = options().seed != 0;
  random_ = options().seed * 2 + 1;
}

Report Block::end_launch() {
  traffics_.report(report_);
  return std::move(report_);
}

}  // namespace fastattn::cuda::sim
