// The running block: its threads as fibers, who waits where, its shared memory.
#pragma once

#include <cstdint>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "async_reads.h"
#include "fiber.h"
#include "global_races.h"
#include "instructions.h"
#include "mbarrier.h"
#include "races.h"
#include "simulator.h"
#include "traffic.h"
#include "transfers.h"
#include "warpgroup.h"

namespace fastattn::cuda::sim {

inline constexpr int kLanes = 32;
inline constexpr uint32_t kAllLanes = 0xFFFFFFFFu;
inline constexpr int kNamedBarriers = 16;

// What a warp does together.  Lanes that meet must be at the same operation with the same parameter at the same line.
enum class Operation : uint8_t {
  kShuffle,
  kVote,
  kSyncWarp,
  kLoadMatrix,
  kStoreMatrix,
  kMultiply,
  kSyncBlock,
  kBarrierSync,
  kBarrierArrive,
  kElect,
  kWarpgroupMultiply,
  kWarpgroupFence,
  kWarpgroupCommit,
  kWarpgroupWait,
  kRegisters,
};

// A cp.async under way: the data is read from `from` when its group is waited for.
struct PendingCopy {
  uint32_t to;
  int bytes;
  const void* from;  // null: zeros
  uint32_t site;
};

// A thread's wait at an mbarrier; `complete` is set by what wakes it.
struct MbarrierWait {
  uint32_t address = 0;  // 0: it does not wait
  uint32_t parity = 0;
  bool for_ever = false;
  bool complete = false;
  uint32_t site = 0;
};

struct Thread {
  Fiber fiber;
  int index = 0;
  std::vector<PendingCopy> copies;  // in order of issue
  std::vector<size_t> copy_groups;  // for each committed group under way, how many copies it has
  size_t uncommitted = 0;           // copies since the last commit
  OutgoingGroups outgoing;
  MbarrierWait wait;
};

struct Warp {
  uint32_t ready = 0;    // lanes that can run
  uint32_t arrived = 0;  // lanes that wait for the others of the warp, at:
  Operation operation{};
  int parameter = 0;
  Where where;
  void* arguments[kLanes] = {};
  int at_barrier = -1;  // the barrier that all lanes wait at, and where they wait
  Where wait_where;
  int registers = 0;           // of each thread
  bool registers_set = false;  // by the kernel
  int wanted_registers = 0;    // 0: the warp does not wait for more
  uint32_t exited = 0;
  Requests requests;
};

// What a thread brings to a barrier, and gets from it.
struct BarrierCall {
  bool predicate;
  int threads;
  int predicates;  // how many held
};

struct Barrier {
  int expected = 0;  // threads; 0: nobody is here
  int arrived = 0;
  int predicates = 0;
  std::vector<int> waiting;                         // threads
  std::vector<std::pair<int, Time>> announcements;  // of all that arrived
};

// State of a byte of shared memory.
// Bit 1: not to be touched by loads and stores.
enum ByteState : uint8_t { kUnwritten = 0, kWritten = 1, kInFlight = 2, kMbarrier = 3 };

class Block {
 public:
  // Runs one block to its end; throws what a thread of it threw.
  void run(const char* kernel, int threads, const Launch& launch, const int (&index)[3], const void* params,
           void (*body)(const void*));

  Thread& self() { return threads_[static_cast<size_t>(current_position.thread)]; }
  Warp& warp() { return warps_[static_cast<size_t>(current_position.thread / kLanes)]; }
  Warp& warp_of(int thread) { return warps_[static_cast<size_t>(thread / kLanes)]; }
  Thread& thread(int index) { return threads_[static_cast<size_t>(index)]; }
  Time& time(int thread) { return times_[static_cast<size_t>(thread)]; }
  // The running thread's warp goes on in a new epoch: what it did before can be told from what it does now.
  uint32_t advance_warp() {
    return races_.advance(&times_[static_cast<size_t>(current_position.thread / kLanes * kLanes)], kLanes);
  }

  // The running thread gives way until it is woken.
  void suspend();
  void wake(int thread) { warp_of(thread).ready |= 1u << thread % kLanes; }

  // All lanes of the warp come here with arguments of their own; the last one does `work` for all.
  template <class Arguments, class Work>
  void meet(Operation operation, int parameter, Where where, Arguments& mine, Work work) {
    Warp& warp = this->warp();
    if (arrive(warp, operation, parameter, where, &mine)) {
      work(warp.arguments);
      release(warp);
    } else {
      suspend();
    }
  }

  // The same for the four warps of a warpgroup.
  template <class Arguments, class Work>
  void meet_warpgroup(Operation operation, int parameter, Where where, Arguments& mine, Work work) {
    if (arrive(this->warp(), operation, parameter, where, &mine) && all_warps_arrived()) {
      void* all[kGroupThreads];
      collect_arguments(all);
      work(all);
      release_warpgroup();
    } else {
      suspend();
    }
  }

  void set_registers(int count, bool increase, Where where);
  void barrier(Operation operation, int id, int threads, bool predicate, Where where, int* predicates);
  void sync_warp(Where where);

  // Errors of the running thread, or of another one of the block.
  [[noreturn]] void fail(Where where, const std::string& message) { fail(current_position.thread, where, message); }
  [[noreturn]] void fail(int thread, Where where, const std::string& message);
  // A number that the running thread hands on must not come from an accumulator whose product was not waited for.
  void check_arrived(const void* numbers, int bytes, const char* what, Where where);
  [[noreturn]] void fail_block(const std::string& message) const;
  std::string name(int thread) const;

  // The block's number along the grid, x fastest, and the words for one.
  uint32_t linear_index() const {
    const Position& p = current_position;
    return static_cast<uint32_t>((p.block[2] * p.grid[1] + p.block[1]) * p.grid[0] + p.block[0]);
  }
  std::string block_text(uint32_t linear) const;

  // Shared memory.
  uint8_t* shared(uint32_t address) { return &bytes_[address - kSharedBase]; }
  // Bounds and alignment; the text says what was tried.
  void check_shared(int thread, uint32_t address, int bytes, const char* what, Where where);
  void check_bounds(int thread, uint32_t address, int bytes, const char* what, Where where);
  // The bytes were written and are not under way; `thread` is whom the error names.
  void check_readable(int thread, uint32_t address, int bytes, const char* what, Where where);
  // Nothing is under way that writes or reads the bytes, and no mbarrier is there.
  void check_write(int thread, uint32_t address, int bytes, const char* what, Where where);
  // The same, and the thread's write is in order; it is noted.
  void begin_write(int thread, uint32_t address, int bytes, const char* what, Where where);
  void mark(uint32_t address, int bytes, ByteState state);
  void check_race(int thread, const Conflict& conflict, uint32_t address, int bytes, const char* what, Where where) {
    if (conflict.found) [[unlikely]] {
      race_error(thread, conflict, address, bytes, what, where);
    }
  }

  // The next number below `count`, the same in every launch of the same seed.
  size_t random(size_t count) {
    random_ = random_ * 6364136223846793005u + 1442695040888963407u;
    return (random_ >> 33) % count;
  }
  bool find_races() const { return find_races_; }
  bool count() const { return count_; }
  Races& races() { return races_; }
  AsyncReads& async_reads() { return async_reads_; }
  Mbarriers& mbarriers() { return mbarriers_; }
  Transfers& transfers() { return transfers_; }
  Warpgroup& warpgroup() { return warpgroups_[static_cast<size_t>(current_position.thread / kGroupThreads)]; }
  GlobalRaces& global_races() { return global_races_; }
  Traffics& traffics() { return traffics_; }
  Report& report() { return report_; }
  void begin_launch(const char* kernel, int threads, int min_blocks, const Launch& launch);
  Report end_launch();

  static void thread_main();

 private:
  bool arrive(Warp& warp, Operation operation, int parameter, Where where, void* arguments);
  void release(Warp& warp);
  // Of the running warp's warpgroup, in which the running warp is complete.
  bool all_warps_arrived();
  void collect_arguments(void* (&all)[kGroupThreads]);
  void release_warpgroup();
  void grant_registers();
  void check_registers() const;
  Thread* next_ready();
  Thread* next_to_run();
  void check_no_copy(int thread, uint32_t address, int bytes, const char* what, Where where);
  void resume_other_lanes(Warp& warp) { warp.ready = kAllLanes & ~(1u << current_position.thread % kLanes); }
  void enter_barrier(Warp& warp, int id, bool waits, Where where);
  void complete_barrier(Barrier& barrier);
  void exit_thread();
  bool all_exited() const;
  void deadlock();
  [[noreturn]] void diverged(Warp& warp, const std::string& newcomer, Where where);
  [[noreturn]] void race_error(int thread, const Conflict& conflict, uint32_t address, int bytes, const char* what,
                               Where where);
  std::string waits_of(Warp& warp, int lane) const;

  std::vector<Thread> threads_;
  int thread_count_ = 0;
  std::vector<Warp> warps_;
  size_t running_warp_ = 0;
  Barrier barriers_[kNamedBarriers];
  Fiber main_;
  std::exception_ptr error_;

  std::vector<uint8_t> bytes_, states_;
  std::vector<Time> times_;
  Races races_;
  AsyncReads async_reads_;
  Mbarriers mbarriers_;
  Transfers transfers_;
  std::vector<Warpgroup> warpgroups_;
  int launch_registers_ = 0, free_registers_ = 0;
  GlobalRaces global_races_;
  Traffics traffics_;
  Report report_;
  bool find_races_ = true, count_ = true;
  bool in_random_order_ = false;
  uint64_t random_ = 1;

  const char* kernel_ = "";
  const void* params_ = nullptr;
  void (*body_)(const void*) = nullptr;
};

// The one block there is.
extern Block block;

// Bounds, permission and order of an access to global memory of any size.
void check_global_bytes(const void* address, int bytes, bool write, bool atomic, const char* what, Where where);

const char* operation_name(Operation operation);
std::string lanes_text(uint32_t lanes);                // "lanes 0-3, 7"
std::string shared_text(uint32_t address, int bytes);  // "16 bytes at shared address base + 32"

}  // namespace fastattn::cuda::sim
