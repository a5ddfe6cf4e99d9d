// What the attention kernels are given: plain structs, passed by value.
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

  // Scores are held in units of q.k times sign(scale) while nothing is added to them (scaled == false), and
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

  PerHead slopes;
  const float* table = nullptr;
  i64 table_batch = 0, table_head = 0;
  int table_left = 0, table_right = 0;  // its columns are left + 1 + right
  Dense bias;                           // its row and column strides are these:
  int bias_row = 0, bias_column = 0;
  Element bias_element = Element::kFloat32;
  PerHead sink;

  const i64* dropout_seed = nullptr;  // two numbers in device memory: Philox key, counter offset
  uint32_t drop_below = 0;            // a weight is kept iff its word is not below this
  float keep_scale = 1;               // 1 / (1 - p)
};

struct ForwardParams {
  Attention attention;
  Result out;
  float* lse = nullptr;         // (B, Hq, Sq)
  float* statistics = nullptr;  // (B, Hq, Sq, 2): largest score and log of the denominator, both to base 2
  int tiles = 0;                // query tiles of a head
  bool two_stages = false;
};

struct DecodeParams {
  Attention attention;
  Result out;
  float* lse = nullptr;
  float* statistics = nullptr;
  int row_tiles = 0;              // tiles of 16 packed (query, head of the group) rows
  int splits = 1;                 // parts of the keys
  int keys_per_split = 0;         // a multiple of the kernel's step
  float* partial_out = nullptr;   // (splits, B, Hq, Sq, Dv), null with one split
  float* partial_stat = nullptr;  // (splits, B, Hq, Sq, 2): largest score to base 2, denominator relative to it
};

struct CombineParams {
  const float* partial_out = nullptr;
  const float* partial_stat = nullptr;
  int splits = 0, batch = 0, heads = 0, query_length = 0, value_dim = 0;
  Element element = Element::kFloat16;
  PerHead sink;
  Result out;
  float* lse = nullptr;
  float* statistics = nullptr;
};

struct DeltaParams {
  Operand out, grad_out;
  PerRow grad_lse;
  const float* statistics = nullptr;
  float* delta = nullptr;  // (B, Hq, Sq): sum of dO * O, less the gradient of lse
  PerHead sink;
  float* partial_sink = nullptr;  // (B, Hq, tiles)
  Element element = Element::kFloat16;
  int batch = 0, heads = 0, query_length = 0, value_dim = 0, tiles = 0;
};

struct BackwardParams {
  Attention attention;
  Operand grad_out;
  const float* statistics = nullptr;
  const float* delta = nullptr;
  int tiles = 0;
  bool two_stages = false;
  // of the kernel over key tiles
  Result dkey, dvalue;  // null where not wanted
  // of the kernel over query tiles
  Result dquery;
  float* partial_slopes = nullptr;  // (B, Hq, tiles)
  float* partial_ends = nullptr;    // (B, Hq, tiles, 2): distances at or beyond the table's left and right end
};

// Gradients that are sums of dS over places: a dense bias, or the inner entries of the distance table.
struct ParameterParams {
  Attention attention;
  Operand grad_out;
  const float* statistics = nullptr;
  const float* delta = nullptr;
  // dense bias: a block owns one tile of the gradient and sums the tiles of dS that broadcast onto it
  void* dbias = nullptr;  // contiguous (grad_batch, grad_heads, 1|Sq, 1|Sk)
  Element element = Element::kFloat32;
  int grad_batch = 1, grad_heads = 1, grad_rows = 1, grad_columns = 1;  // tiles
  int sum_batch = 1, sum_heads = 1, sum_rows = 1, sum_columns = 1;
  bool one_row = false, one_column = false;
  // table: a block owns a block diagonal (key tile - query tile = first_diagonal + n) and every splits-th tile of it
  float* partial_diagonals = nullptr;  // (batches apart, Hq, diagonals, splits, 128)
  int first_diagonal = 0, diagonals = 0, splits = 1, rows = 0, columns = 0;
};

// out[b, h] (+)= sum over t (and over b where the parameter has no batch) of partial[b, h, t * step + first]
struct SumPartialsParams {
  const float* partial = nullptr;
  int batch = 0, heads = 0, count = 0, step = 1, first = 0;
  float* out = nullptr;
  i64 out_batch = 0, out_head = 0;
  bool sum_batch = false, accumulate = false;
};

// dtable[b, h, c] of the inner columns, from per-diagonal sums
struct SumDiagonalsParams {
  const float* partial = nullptr;  // as ParameterParams::partial_diagonals
  int apart = 1, heads = 0, diagonals = 0, splits = 1, first_diagonal = 0;
  int query_offset = 0;
  PerBatch query_offsets;
  float* dtable = nullptr;  // contiguous (1|B, Hq, columns)
  int columns = 0, table_left = 0, out_batch = 1;
};

}  // namespace fastattn::cuda
