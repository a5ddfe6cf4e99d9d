// What kernels are given of a Problem: plain structs, passed by value.
//
// Strides count elements; a broadcast dimension has stride zero.  A pointer that is null is a stage that is absent, so
// a kernel's features are known from the presence of their tensors.  Kernels branch on them once per tile: every branch
// is the same for all threads of a block.
#pragma once

#include <cstdint>

namespace fastattn::cuda {

using i64 = int64_t;

// (B, H, S, D) of 16-bit elements: the last dimension is dense, rows start at multiples of 16 bytes.
struct Operand {
  const void* data = nullptr;
  i64 batch = 0, head = 0, row = 0;
};

struct Result {
  void* data = nullptr;
  i64 batch = 0, head = 0, row = 0;
};

// One number per batch.
struct PerBatch {
  const i64* data = nullptr;
  i64 batch = 0;
};

// (B, S) of ids.
struct Ids {
  const i64* data = nullptr;
  i64 batch = 0;
};

// (B, H, blocks, 4): what each block of kSpanRows rows sees by ids and masks, as the four numbers of a Range.
struct Spans {
  const int32_t* data = nullptr;
  i64 batch = 0, head = 0;
};
inline constexpr int kSpanRows = 16;

// (B, H) of float32.
struct PerHead {
  const float* data = nullptr;
  i64 batch = 0;
};

// (B, H, Sq) of float32.
struct PerRow {
  const float* data = nullptr;
  i64 batch = 0, head = 0, row = 0;
};

// (B, Hq, Sq, C) and (B, Hk, C, Sk) of float32, whose last dimension is dense: query i and key j read rows[i][c] and
// cols[c][j] at c = columns[clamp(distance, -left, right) + left].
struct ContentTables {
  const float *rows = nullptr, *cols = nullptr;
  i64 rows_batch = 0, rows_head = 0, cols_batch = 0, cols_head = 0;
  int rows_row = 0, cols_column = 0;
  const int32_t* columns = nullptr;  // null: a column for each distance
  int left = 0, right = 0;           // T = left + 1 + right
  int last = 0;                      // C - 1
};

enum class Element : int { kFloat32, kFloat16, kBFloat16 };

// (B, H, Sq, Sk)
struct Dense {
  const void* data = nullptr;
  i64 batch = 0, head = 0, row = 0, column = 0;
};

// Everything the kernels share.  Positions, lengths and windows fit 31 bits (the launcher sees to it).
struct Attention {
  Operand query, key, value;
  int batch = 0, heads = 0, group = 1;  // query heads; query heads per key head
  int query_length = 0, key_length = 0;
  int head_dim = 0, value_dim = 0;  // multiples of 8, at most the kernel's own

  // Scores are held in units of q.k times sign(scale) while nothing but slopes is added to them (scaled == false), and
  // `multiplier` takes them to base-2 logarithms inside the exponential; else they are base-2 logarithms already.
  bool scaled = false, negate = false;
  float multiplier = 1;
  float scale_log2 = 1;                   // scale * log2(e)
  float softcap_in = 0, softcap_out = 0;  // scale / softcap, softcap * log2(e); 0 = no cap
  float scale = 1;                        // for the gradients of query and key

  int query_offset = 0;
  int window_left = -1, window_right = -1;
  PerBatch query_offsets, key_lengths, prefix_lengths;
  Ids query_ids, key_ids;
  Dense mask;  // bytes, non-zero = may attend
  // Keys that blocks of queries see, and queries that blocks of keys see; null where that was not looked for.
  Spans key_spans, query_spans;

  PerHead slopes;
  float slope_unit = 1;  // from a slope to the units of scores
  const float* table = nullptr;
  i64 table_batch = 0, table_head = 0;
  int table_left = 0, table_right = 0;  // its columns are left + 1 + right
  Dense bias;                           // its row and column strides are these:
  int bias_row = 0, bias_column = 0;
  Element bias_element = Element::kFloat32;
  ContentTables content;
  PerHead sink;

  const i64* dropout_seed = nullptr;  // two numbers in device memory: Philox key, counter offset
  uint32_t drop_below = 0;            // a weight is kept iff its word is not below this
  float keep_scale = 1;               // 1 / (1 - p)
};

}  // namespace fastattn::cuda
