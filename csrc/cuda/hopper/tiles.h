// Tiles of the sm_90a kernels and what they take: one pure table, read by the kernels at compile time, by the host when
// it launches, and by `explain`.
//
// Shared memory and registers of a multiprocessor are spent by one block: 227 KB, and 64K registers that the warpgroups
// share as they say (setmaxnreg).  A warpgroup of consumers owns 64 rows; a thread of it holds D / 2 accumulators of
// the output, keys / 2 scores and keys / 4 registers of weights, which are the left operand of the second product.
#pragma once

namespace fastattn::cuda {

inline constexpr int kHopperDims[] = {64, 96, 128, 192, 256};
inline constexpr int kHopperE4M3Dims[] = {64, 128, 256};
inline constexpr int kMostKeysInFewBits = 1024;    // where sums are not added apart
inline constexpr int kHopperSharedBytes = 232448;  // that a block may have
inline constexpr int kHopperRegisters = 65536;     // of a multiprocessor
inline constexpr int kCheckers = 3;  // warps of the producers' warpgroup that look for NaN among the values

struct HopperForwardTiles {
  int dim, groups, keys, stages;  // groups: warpgroups of consumers
  bool alternate;   // consumers take turns at the tensor cores, so that one's softmax meets another's products
  int element = 2;  // bytes; of 8 bits, values are transposed on their way (transpose.h)

  constexpr int rows() const { return 64 * groups; }
  constexpr int threads() const { return 128 * (groups + 1); }

  // Registers of a thread.  All start with what the launch gives, and that is all there is: consumers wait for ever for
  // more than producers give up.
  constexpr int launch_registers() const { return kHopperRegisters / threads() / 8 * 8; }
  constexpr bool transposes() const { return element == 1; }
  // Of 8 bits: sums of a tile of keys are made apart and added in float32 (hopper/README.md), where there are
  // registers.
  constexpr bool adds_apart() const { return transposes() && dim <= 128; }
  constexpr int producer_registers() const { return adds_apart() ? 40 : transposes() ? 56 : groups == 3 ? 32 : 24; }
  constexpr int consumer_registers() const { return adds_apart() ? 232 : transposes() ? 224 : groups == 3 ? 160 : 240; }
  // accumulators, scores, weights
  constexpr int held_registers() const { return dim / 2 * (adds_apart() ? 2 : 1) + keys / 2 + keys * element / 8; }

  // Shared memory: queries; stages of keys; stages of values; of 8 bits, the same as they came; output where there is
  // room, else it takes the queries' place; for each stage which values are not finite; a copy of the tile's context
  // for each warp of consumers; barriers.
  constexpr int query_bytes() const { return element * rows() * dim; }
  constexpr int key_bytes() const { return element * keys * dim; }
  constexpr int out_bytes() const { return 2 * rows() * dim; }
  // turned, rows have whole panels of 64 keys
  constexpr int value_bytes() const { return transposes() ? dim * ((keys + 63) / 64 * 64) : key_bytes(); }
  constexpr int keys_at() const { return query_bytes(); }
  constexpr int values_at() const { return keys_at() + stages * key_bytes(); }
  constexpr int arrivals_at() const { return values_at() + stages * value_bytes(); }
  constexpr int after_values() const { return arrivals_at() + (transposes() ? stages * key_bytes() : 0); }
  constexpr int check_bytes() const { return 16 + (keys + 15) / 16 * 16; }  // a word per checker, a byte per key
  constexpr int barriers() const { return 2 + (transposes() ? 6 : 5) * stages; }
  static constexpr int kContextBytes = 48 + 4 * 16;  // of a warp: what its tile is, slopes of its rows
  constexpr int context_bytes() const { return 4 * groups * kContextBytes; }
  constexpr int small_bytes() const { return stages * check_bytes() + context_bytes() + 8 * barriers(); }
  constexpr bool own_out() const { return after_values() + out_bytes() + small_bytes() <= kHopperSharedBytes; }
  constexpr int out_at() const { return own_out() ? after_values() : 0; }
  constexpr int checks_at() const { return after_values() + (own_out() ? out_bytes() : 0); }
  constexpr int contexts_at() const { return checks_at() + stages * check_bytes(); }
  constexpr int barriers_at() const { return contexts_at() + context_bytes(); }
  constexpr int shared_bytes() const { return barriers_at() + 8 * barriers(); }

  constexpr bool fits() const {
    return shared_bytes() <= kHopperSharedBytes && out_bytes() <= (own_out() ? out_bytes() : query_bytes()) &&
           held_registers() <= consumer_registers() - 16 &&
           producer_registers() + groups * consumer_registers() <= (groups + 1) * launch_registers();
  }
};

// `plain`: no stage but intervals of keys (causal, windows, lengths, prefixes), a sink and dropout's absence.
constexpr HopperForwardTiles hopper_forward_tiles(int dim, bool plain) {
  switch (dim) {
    case 64:
      return plain ? HopperForwardTiles{64, 3, 128, 4, true} : HopperForwardTiles{64, 2, 128, 4, true};
    case 96:
      return {96, 2, 128, 2, true};
    case 128:
      return {128, 2, 128, 2, true};
    case 192:
      return {192, 2, plain ? 112 : 96, 2, false};
    default:
      return {256, 2, plain ? 80 : 64, 2, false};
  }
}

// Of 8 bits: the output, of 16, has a place of its own.
constexpr HopperForwardTiles hopper_e4m3_tiles(int dim, bool plain) {
  switch (dim) {
    case 64:
      return {64, 2, 128, 4, true, 1};
    case 128:
      return {128, 2, plain ? 128 : 64, 2, true, 1};
    default:
      return {256, 2, 64, 2, false, 1};
  }
}

// How many of the `group` query heads of a key head share a tile (params.h: Packing): those that make the fewest tiles.
// A tile costs what its keys cost, however many of its rows exist, so fewer tiles are less work, by as much; where the
// number is the same nothing is won, and heads stay apart.
constexpr int packed_heads(long long queries, int group, int row_groups) {
  int best = 1;
  long long fewest = 0;
  for (int heads = 1; heads <= 64 && heads <= group; ++heads) {
    if (group % heads != 0) continue;
    const int rows = row_groups * (64 / heads);
    const long long tiles = (queries + rows - 1) / rows * (group / heads);
    if (heads > 1 && tiles >= fewest) continue;
    best = heads;
    fewest = tiles;
  }
  return best;
}
static_assert(packed_heads(4096, 8, 2) == 1 && packed_heads(1, 8, 2) == 8 && packed_heads(20, 8, 2) == 4);

// dQ: two groups of 64 query rows, which hold queries and gradients of the output while keys and values come by.
struct HopperBackwardQTiles {
  int dim, keys, stages;
  static constexpr int kGroups = 2, kRows = 64 * kGroups, kThreads = 128 * (kGroups + 1);
  static constexpr int kProducerRegisters = 24, kRegisters = 240;
  constexpr int held_registers() const { return dim / 2 + keys + keys / 4; }  // accumulators, scores and dS, dS packed
  // queries; gradients; stages of keys and values; contexts; a number for each warp to add up; barriers
  constexpr int grads_at() const { return 2 * kRows * dim; }
  constexpr int ring_at() const { return 2 * grads_at(); }
  constexpr int stage_bytes() const { return 4 * keys * dim; }
  constexpr int contexts_at() const { return ring_at() + stages * stage_bytes(); }
  constexpr int sums_at() const { return contexts_at() + 4 * kGroups * 48; }
  constexpr int barriers_at() const { return sums_at() + 4 * 4 * kGroups; }
  constexpr int shared_bytes() const { return barriers_at() + 8 * (2 + 3 * stages); }
  constexpr bool fits() const { return shared_bytes() <= kHopperSharedBytes && held_registers() <= kRegisters - 16; }
};

constexpr HopperBackwardQTiles hopper_backward_q_tiles(int dim, bool plain) {
  switch (dim) {
    case 64:
      return {64, plain ? 128 : 64, 2};
    case 96:
      return {96, plain ? 96 : 64, 2};
    case 128:
      return {128, plain ? 80 : 64, 2};
    case 192:
      return {192, plain ? 80 : 64, 2};
    default:
      return {256, 48, 2};
  }
}

// dK and dV: two groups hold keys and values while queries and gradients come by.  Up to D = 128 each has 64 keys and
// both their results.  Above, the accumulators of both do not fit beside the scores: the groups have the same 64 keys,
// one of them the weights and dV, the other dS and dK, and weights go from the one to the other (backward_kv_split.h).
struct HopperBackwardKvTiles {
  int dim, queries, stages;
  static constexpr int kGroups = 2, kThreads = 128 * (kGroups + 1);
  static constexpr int kProducerRegisters = 24, kRegisters = 240;
  constexpr bool split() const { return dim > 128; }
  constexpr int keys() const { return split() ? 64 : 64 * kGroups; }
  // results; scores and dP, or dP and the scores once more; what of weights and dS is packed
  constexpr int held_registers() const {
    return split() ? dim / 2 + queries + queries / 4 : dim + queries + queries / 2;
  }
  // keys; values; stages of queries and gradients; weights on their way; three numbers for each row of a stage;
  // barriers
  constexpr int values_at() const { return 2 * keys() * dim; }
  constexpr int ring_at() const { return 2 * values_at(); }
  constexpr int stage_bytes() const { return 4 * queries * dim; }
  constexpr int weights_at() const { return ring_at() + stages * stage_bytes(); }
  constexpr int statistics_at() const { return weights_at() + (split() ? 4 * 64 * queries : 0); }
  constexpr int barriers_at() const { return statistics_at() + stages * 12 * queries; }
  constexpr int shared_bytes() const { return barriers_at() + 8 * (3 + 3 * stages); }
  constexpr bool fits() const { return shared_bytes() <= kHopperSharedBytes && held_registers() <= kRegisters - 16; }
};

constexpr HopperBackwardKvTiles hopper_backward_kv_tiles(int dim, bool plain) {
  if (dim == 192) return {192, plain ? 96 : 80, 2};
  return {dim, plain || dim < 96 || dim > 128 ? 64 : 32, 2};
}

template <class Tiles, int kDims>
constexpr bool all_fit(Tiles (*tiles)(int, bool), const int (&dims)[kDims]) {
  for (const int dim : dims)
    if (!tiles(dim, true).fits() || !tiles(dim, false).fits()) return false;
  return true;
}
static_assert(all_fit(hopper_forward_tiles, kHopperDims) && all_fit(hopper_e4m3_tiles, kHopperE4M3Dims) &&
              all_fit(hopper_backward_q_tiles, kHopperDims) && all_fit(hopper_backward_kv_tiles, kHopperDims));

}  // namespace fastattn::cuda
