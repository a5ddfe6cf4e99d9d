// What the sm_90a kernels are given.
#pragma once

#include "../arch/tensor_map.h"
#include "../attention/params.h"

namespace fastattn::cuda {

// A tensor (B, H, S, D) as tensor copies take it: coordinates of head and batch are multiplied by their steps, which
// are zero where that dimension is broadcast.
struct MappedOperand {
  TensorMap map;
  int head_step = 1, batch_step = 1;
};

// In which order blocks take tiles of query rows (schedule.h).
struct Schedule {
  int tiles = 0;               // of a head
  int pairs = 0;               // of batch and head
  int total = 0;               // tiles of all
  int section = 1;             // pairs whose keys and values stay in L2 together
  bool longest_first = false;  // the last tiles come first
};

// Which query and head a row of a tile of queries is.  Heads that share a key head may share a tile: row r of a group
// of 64 is then query r / heads of head r % heads.  Where `heads` does not divide 64, the last rows are nobody's.
struct Packing {
  int heads = 1;
  int queries = 64;          // of a group: 64 / heads
  int reciprocal = 1 << 16;  // r / heads is r * reciprocal >> 16, for r up to 64
  int packs = 1;             // of a batch: its heads / heads
};

constexpr Packing packing_of(int heads, int all_heads) {
  return {heads, 64 / heads, 65535 / heads + 1, all_heads / heads};
}

struct HopperForwardParams {
  MappedOperand query, out;  // (B, S, H, D): a box takes the heads of a pack and their queries (packed_map_of)
  MappedOperand key, value;
  Packing packing;
  Attention attention;  // its operands are not used
  Result rows_out;      // the output once more, for rows that see nothing
  float* lse = nullptr;
  float* statistics = nullptr;  // as in ForwardParams; not of 8 bits
  Schedule schedule;
  PerHead query_scale, key_scale, value_scale;  // of 8 bits: what their numbers are multiplied by; null: 1
};

struct HopperBackwardParams {
  MappedOperand query, key, value, grad_out;
  Attention attention;  // its operands are not used
  const float* statistics = nullptr;
  const float* delta = nullptr;
  Schedule schedule;  // of tiles of query rows, or of keys
  // each once more for rows that see nothing
  MappedOperand dquery, dkey, dvalue;
  Result rows_dquery, rows_dkey, rows_dvalue;  // null where not wanted
  float* partial_slopes = nullptr;             // as BackwardParams, with a place for each group of 64 rows
  float* partial_ends = nullptr;
};

}  // namespace fastattn::cuda
