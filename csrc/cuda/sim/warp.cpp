#include "block.h"

namespace fastattn::cuda::sim {

uint32_t shuffle(Shuffle kind, uint32_t value, int lane, Where where) {
  struct Arguments {
    uint32_t value;
    int lane;
    uint32_t result;
  } mine{value, lane, 0};
  block.check_arrived(&value, 4, "shuffle", where);
  block.meet(Operation::kShuffle, static_cast<int>(kind), where, mine, [kind](void** all) {
    ++block.report().shuffles;
    for (int i = 0; i < kLanes; ++i) {
      auto* to = static_cast<Arguments*>(all[i]);
      int source = i;
      switch (kind) {
        case Shuffle::kIndex:
          source = to->lane & (kLanes - 1);
          break;
        case Shuffle::kXor:
          source = (i ^ to->lane) & (kLanes - 1);
          break;
        case Shuffle::kUp:
          source = i - (to->lane & (kLanes - 1));
          break;
        case Shuffle::kDown:
          source = i + (to->lane & (kLanes - 1));
          break;
      }
      if (source < 0 || source >= kLanes) source = i;
      to->result = static_cast<const Arguments*>(all[source])->value;
    }
  });
  return mine.result;
}

uint32_t ballot(bool predicate, Where where) {
  struct Arguments {
    bool predicate;
    uint32_t result;
  } mine{predicate, 0};
  block.meet(Operation::kVote, 0, where, mine, [](void** all) {
    ++block.report().shuffles;
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= uint32_t{static_cast<const Arguments*>(all[i])->predicate} << i;
    for (int i = 0; i < kLanes; ++i) static_cast<Arguments*>(all[i])->result = bits;
  });
  return mine.result;
}

bool elect_one(Where where) {
  int nothing = 0;
  block.meet(Operation::kElect, 0, where, nothing, [](void**) {});
  return current_position.thread % kLanes == 0;
}

// Each thread by itself: what it wrote, and what others wrote that it knows of, is there for copies and products.
void fence_async_shared(Where) {
  if (!block.find_races()) return;
  block.races().fence(block.time(current_position.thread));
  block.advance_warp();
}

void sync_warp(Where where) { block.sync_warp(where); }

int sync_block(bool predicate, Where where) {
  int count = 0;
  block.barrier(Operation::kSyncBlock, 0, current_position.threads, predicate, where, &count);
  return count;
}

void named_barrier(int id, int threads, bool wait, Where where) {
  block.barrier(wait ? Operation::kBarrierSync : Operation::kBarrierArrive, id, threads, false, where, nullptr);
}

}  // namespace fastattn::cuda::sim
