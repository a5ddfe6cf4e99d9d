// Tiles of the attention kernels: one pure table, read by the kernels at compile time and by the host when it launches.
//
// The bound is registers: 255 per thread, none spilled, every optional stage included.  A band of 16 rows takes D / 2
// accumulators per lane for its output and half its keys for its scores.  Two bands per warp read a fragment of K or V
// half as often, which is what shared memory has to deliver; they fit in the forward up to D = 128 with 32 keys a step.
#pragma once

namespace fastattn::cuda {

inline constexpr int kHeadDims[] = {32, 64, 96, 128, 192, 256};

struct ForwardTiles {
  int dim, rows, keys, warps, min_blocks;
  constexpr int bands() const { return rows / (16 * warps); }
  constexpr int threads() const { return 32 * warps; }
  // queries; a flag per key and the block's context; stages of keys; stages of values
  constexpr int flags_at() const { return 2 * rows * dim; }
  constexpr int context_at() const { return flags_at() + 4 * keys; }
  constexpr int keys_at() const { return (context_at() + 64 + 127) / 128 * 128; }
  constexpr int shared_bytes(bool two_stages) const { return keys_at() + (two_stages ? 8 : 4) * keys * dim; }
};

constexpr ForwardTiles forward_tiles(int dim) {
  return {dim, 128, dim <= 32 ? 64 : 32, dim <= 128 ? 4 : 8, dim <= 128 ? 2 : 1};
}

struct BackwardQTiles {
  int dim, rows, keys;
  constexpr int warps() const { return rows / 16; }
  constexpr int threads() const { return 32 * warps(); }
  // queries, gradients of the output, the block's context, stages of keys, stages of values
  constexpr int context_at() const { return 4 * rows * dim; }
  constexpr int keys_at() const { return context_at() + 128; }
  constexpr int shared_bytes(bool two_stages) const { return keys_at() + (two_stages ? 8 : 4) * keys * dim; }
};

constexpr BackwardQTiles backward_q_tiles(int dim) { return {dim, dim <= 128 ? 128 : 64, dim <= 64 ? 64 : 32}; }

struct BackwardKvTiles {
  int dim, keys, queries;
  int parts;  // warps that share a band of keys, each with its part of the columns: above 128 they do not fit in one
  static constexpr int kWarps = 8;
  constexpr int threads() const { return 32 * kWarps; }
  // largest score and log of the sum in pairs, then delta
  constexpr int statistics_bytes() const { return 12 * queries; }
  // keys, values, stages of queries and gradients of the output, stages of statistics
  constexpr int shared_bytes(bool two_stages) const {
    return 4 * keys * dim + (two_stages ? 2 : 1) * (4 * queries * dim + statistics_bytes());
  }
};

constexpr BackwardKvTiles backward_kv_tiles(int dim) {
  return {dim, dim <= 128 ? 128 : 64, dim <= 64 ? 64 : 32, dim <= 128 ? 1 : 2};
}

// Few queries: 16 rows, each warp with tiles of keys of its own.
struct DecodeTiles {
  int dim, keys;
  static constexpr int kRows = 16, kWarps = 4;
  constexpr int threads() const { return 32 * kWarps; }
  constexpr int step() const { return keys * kWarps; }
  // queries; then each warp's keys and values, which give way to each warp's accumulators, largest scores and sums
  constexpr int shared_bytes() const {
    const int tiles = kWarps * 4 * keys * dim, merge = kWarps * kRows * (dim + 2) * 4;
    return 2 * kRows * dim + (tiles > merge ? tiles : merge);
  }
};

constexpr DecodeTiles decode_tiles(int dim) { return {dim, dim <= 128 ? 32 : 16}; }

// Gradients of biases: square tiles of scores, head dimensions walked 64 columns at a time.
struct ParameterTiles {
  static constexpr int kSize = 64, kWarps = 4, kThreads = 32 * kWarps;
  static constexpr int kDiagonals = 128;                // of a tile, the last of them empty
  static constexpr int kSharedBytes = 4 * 64 * 64 * 2;  // two stages of two operands
};

struct SpansTiles {
  static constexpr int kWarps = 4, kThreads = 32 * kWarps, kSharedBytes = 16 * kWarps;
  static constexpr int kRows = 16 / kWarps;  // of a warp
  static constexpr int kSteps = 4;           // columns of a lane that are under way together
};

struct DeltaTiles {
  static constexpr int kRows = 16, kThreads = 8 * kRows, kSharedBytes = 4 * kRows;
};

struct CombineTiles {
  static constexpr int kRows = 4, kThreads = 32 * kRows;
};

struct SumTiles {
  static constexpr int kThreads = 128, kSharedBytes = 4 * kThreads / 32;
};

}  // namespace fastattn::cuda
