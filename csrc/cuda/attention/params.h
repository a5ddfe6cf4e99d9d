// What each attention kernel is given.
#pragma once

#include "../features/params.h"

namespace fastattn::cuda {

// Rows are queries and columns keys, or the other way round: the mask's strides with them.
struct SpansParams {
  Ids row_ids, column_ids;
  Dense mask;
  int rows = 0, columns = 0;
  int heads = 1;             // 1 where the mask has none
  int blocks = 0;            // of rows
  int32_t* spans = nullptr;  // (B|1, heads, blocks, 4)
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
  Result dkey, dvalue;          // null where not wanted
  float* dcol_table = nullptr;  // contiguous (B, Hk, C, Sk)
  // of the kernel over query tiles
  Result dquery;
  float* partial_slopes = nullptr;  // (B, Hq, tiles)
  float* partial_ends = nullptr;    // (B, Hq, tiles, 2): distances at or beyond the table's left and right end
  float* drow_table = nullptr;      // contiguous (B, Hq, Sq, C)
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

// One of the two: that which has somewhere to write.
struct SumParams {
  SumPartialsParams partials;
  SumDiagonalsParams diagonals;
};

}  // namespace fastattn::cuda
