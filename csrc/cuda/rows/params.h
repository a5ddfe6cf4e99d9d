// What the kernels over rows are given: plain structs, passed by value.  Strides count elements.
#pragma once

#include "../features/params.h"

namespace fastattn::cuda {

// A (B, H, S, D) tensor whose last dimension is dense.
struct Rows {
  void* data = nullptr;
  i64 batch = 0, head = 0, row = 0;
};

// (B|1, P, R/2) of float32.
struct RotaryTable {
  const float* data = nullptr;
  i64 batch = 0, row = 0, column = 0;
};

// Queries or keys: where they are, where they go, their tables and their positions.
struct RotarySide {
  Rows from, to;
  RotaryTable cos, sin;
  const i64* positions = nullptr;  // row of the tables that each token takes; null: its index plus the offset
  i64 positions_batch = 0, positions_token = 0;
  PerBatch offsets;
  i64 offset = 0;
  int heads = 0, length = 0;
  int tokens = 0;  // batch * length
  int groups = 0;  // of heads that share a block
  int blocks = 0;
  i64 table_rows = 0;  // P
};

struct RotaryParams {
  RotarySide side[2];
  int dim = 0, half = 0;  // 2 * half of dim elements rotate
  bool interleaved = false, conjugate = false;
  bool copy_rest = false;  // the elements that do not rotate have to be moved
  bool wide = false;       // every access can be of 16 bytes
  int units = 0;           // a token's row in pieces: pairs of vectors, or vectors, or single ones of either
  int tokens_per_block = 0;
};

// How the rows of scores are dealt to the threads of a block (row_threads.h).
struct RowDeal {
  int rows = 0;          // B * H * Sq
  int threads = 1;       // of a row: a power of two, up to all of a block
  int tiles = 1;         // parts of a row that its threads hold at once
  bool wide = false;     // 16-byte accesses
  int thread_step = 1;   // columns from a thread's first to its neighbour's
  int element_step = 1;  // columns from one element of a chunk to the next
};

// The masked softmax.  `features` holds the masks, biases and lengths; its operands are not used.
struct SoftmaxParams {
  Attention features;
  Rows scores, out;
  float scale = 1;
  RowDeal deal;
  bool wide_mask = false, wide_bias = false;  // as many columns at a time as of the scores
};

// Its gradients that take one pass over the rows: of the scores, and sums of dS along each row.
struct SoftmaxGradientParams {
  Attention features;
  Rows out, grad_out;
  Rows dscores;  // null where not wanted, as the sums are
  float scale = 1;
  RowDeal deal;
  float* delta = nullptr;      // (B, H, Sq): sum of out * grad_out
  float* distances = nullptr;  // (B, H, Sq): sum of dS * |distance|
  float* ends = nullptr;       // (2, B, H, Sq): sum of dS at or beyond the table's left end, and its right end
  float* totals = nullptr;     // (B, H, Sq): sum of dS
};

// Sums of dS along columns, or along diagonals.  A thread owns a line; a block owns neighbouring lines of some rows of
// some (batch, head), and loops over the batches and heads that share them.
struct LineSumParams {
  Attention features;
  Rows out, grad_out;
  Element element = Element::kFloat32;  // of those two
  const float* delta = nullptr;
  bool diagonal = false;  // line n is column i + offset + first_distance + n of row i; else column n
  int first_distance = 0, lines = 0;
  int batches = 1, heads = 1;          // of the sums
  int sum_batches = 1, sum_heads = 1;  // that add up to each
  int parts = 1, rows_per_part = 1;    // of the rows
  void* sums = nullptr;                // (batches, heads, parts, lines) contiguous
  Element sum_element = Element::kFloat32;
};

// out[b, h, n] (+)= sign * sum over t, and over the batches and heads that share it, of parts[b, h, t, n].
struct PartSumParams {
  const float* parts = nullptr;  // (batches * sum_batches, heads * sum_heads, count, lines) contiguous
  int batches = 1, heads = 1, sum_batches = 1, sum_heads = 1, count = 1, lines = 1;
  float sign = 1;
  void* out = nullptr;
  i64 out_batch = 0, out_head = 0;
  Element out_element = Element::kFloat32;
  bool accumulate = false;  // of float32 only
};

}  // namespace fastattn::cuda
