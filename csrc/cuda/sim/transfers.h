// Copies that run beside the threads (TMA).  A load arrives as late as it can, unless the launch has a seed: when no
// thread can go on, one of those under way, picked by chance, brings its data to its mbarrier.  A store keeps its
// source until its thread has waited for the read, and reaches global memory when its thread has waited for all of it,
// or when the block ends.
#pragma once

#include <cstdint>
#include <vector>

#include "instructions.h"
#include "tensor_map.h"

namespace fastattn::cuda::sim {

// A box of a tensor, or contiguous bytes.
struct Piece {
  const EncodedMap* map;  // null: contiguous
  int at[5];              // coordinates of the box
  uint8_t* data;          // contiguous: global memory
  int bytes;              // in shared memory, all of the box
};

// A store or a reduction under way.
struct Outgoing {
  Piece piece;
  bool add;
  uint32_t site;
  uint32_t read;  // of shared memory: its number
  bool read_over;
  std::vector<uint8_t> rows;  // what it stores, in the order of the tensor
};

// The stores of one thread.
struct OutgoingGroups {
  std::vector<Outgoing> open;
  std::vector<std::vector<Outgoing>> committed;
  bool empty() const { return open.empty() && committed.empty(); }
};

class Transfers {
 public:
  void begin_block() { loads_.clear(), late_.clear(); }

  void load(const Piece& piece, uint32_t to, uint32_t barrier, Where where);
  void store(const Piece& piece, uint32_t from, bool add, Where where);
  void commit();
  void wait(int pending, bool only_reads);

  // One load arrives; false: there is none.
  bool arrive();
  // The thread that issued a load to these bytes and where, or nothing.
  bool find_load(uint32_t address, int bytes, int& thread, uint32_t& site) const;
  // Of the running thread, which exits.
  void check_exit();
  // The block has ended: stores reach memory, loads must all have arrived.
  void end_block();

 private:
  struct Load {
    Piece piece;
    uint32_t to, barrier, site;
    int thread;
  };
  static void finish(const Outgoing& store);

  std::vector<Load> loads_;
  std::vector<Outgoing> late_;  // stores that only the end of the block completes
};

}  // namespace fastattn::cuda::sim
