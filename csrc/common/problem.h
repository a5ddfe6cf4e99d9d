// One attention call as plain data: the C++ twin of fastattn/problem.py (same names, same meaning).
//
// Every tensor is a view of up to four dimensions with strides in elements.  A dimension of size one has
// stride zero, so kernels index (b, h, i, j) without asking which dimensions are broadcast.  Absent = null.
#pragma once

#include <cstdint>

namespace fastattn {

using i64 = int64_t;

// Inlined everywhere: an out-of-line copy compiled with wide instructions could be the one the linker keeps.
#define FASTATTN_INLINE __attribute__((always_inline)) inline

enum class DType : int { kFloat32, kFloat64, kBFloat16, kFloat16, kBool, kInt32, kInt64 };
// float8_e4m3fn: of operands for the kernels that take it, and of nothing that is converted.
inline constexpr DType kFloat8{7};

FASTATTN_INLINE i64 element_size(DType type) {
  switch (type) {
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    case DType::kBool:
      return 1;
  }
  return 1;
}

struct View {
  const void* data = nullptr;
  DType dtype = DType::kFloat32;
  i64 size[4] = {1, 1, 1, 1};
  i64 stride[4] = {0, 0, 0, 0};

  FASTATTN_INLINE explicit operator bool() const { return data != nullptr; }

  FASTATTN_INLINE const char* at(i64 a, i64 b = 0, i64 c = 0, i64 d = 0) const {
    return static_cast<const char*>(data) +
           (a * stride[0] + b * stride[1] + c * stride[2] + d * stride[3]) * element_size(dtype);
  }
  FASTATTN_INLINE char* mutable_at(i64 a, i64 b = 0, i64 c = 0, i64 d = 0) const {
    return const_cast<char*>(at(a, b, c, d));
  }
};

struct Problem {
  i64 batch = 0, query_heads = 0, kv_heads = 0, query_length = 0, key_length = 0, head_dim = 0, value_dim = 0;
  View query, key, value;  // (B, H, S, D)
  double scale = 1, softcap = 0;
  View query_cos, query_sin, key_cos, key_sin;  // (B|1, P, R/2)
  bool interleaved = false;
  i64 query_offset = 0;
  View query_offsets;                       // (B|1,)
  i64 window_left = -1, window_right = -1;  // -1 = unbounded
  View key_lengths, prefix_lengths;         // (B|1,)
  View query_ids, key_ids;                  // (B|1, S)
  View dense_mask;                          // (B|1, Hq|1, Sq|1, Sk|1)
  View row_intervals;                       // (B|1, Hq|1, Sq|1, 2): the keys of each query, [first, last + 1); never
                                            // from a caller: the CPU kernels make it of a dense mask that is no more
  View slopes;                              // (B|1, Hq)
  View table;                               // (B|1, Hq, T)
  i64 table_left = 0;
  View dense_bias;            // (B|1, Hq|1, Sq|1, Sk|1)
  View row_table, col_table;  // (B, Hq, Sq, C), (B, Hk, C, Sk), last dimension dense
  View columns;               // (T,) in [0, C), rising, dense
  i64 columns_left = 0;
  View sink;  // (B|1, Hq)
  double dropout_p = 0;
  uint64_t dropout_seed = 0;    // Philox key
  uint32_t dropout_offset = 0;  // last word of the Philox counter
  View seed;                    // (2,): the same two numbers in the tensors' own memory; CUDA kernels read them there

  FASTATTN_INLINE i64 group() const { return kv_heads ? query_heads / kv_heads : 1; }
  FASTATTN_INLINE i64 table_columns() const {
    return row_table ? row_table.size[3] : col_table ? col_table.size[2] : 0;
  }
  FASTATTN_INLINE i64 column_entries() const { return columns ? columns.size[0] : table_columns(); }
};

// What the numbers of 8-bit operands are multiplied by; null: 1.
struct OperandScales {
  View query, key, value;  // (B|1, Hq), (B|1, Hk), (B|1, Hk)
};

// lse and statistics may be null in the CPU's attention: results nobody asked for.
struct ForwardOutput {
  View out;  // (B, Hq, Sq, Dv)
  View lse;  // (B, Hq, Sq)
  // (B, Hq, Sq, 2): a row's largest score, in the units the kernel holds scores in, and the base-2 logarithm of its
  // denominator relative to that score.  Their sum, lse, rounds: beside scores of 1e9 the logarithm would be lost, and
  // with it every weight the backward recomputes.
  View statistics;
};

// The weights beside the output, of every head or, with `average`, of none: then the view has one head.
struct WeightsOutput {
  View view;  // (B, Hq|1, Sq, Sk), after dropout, in the dtype of the query
  bool average = false;
  i64 leading = 0;  // so many keys at the front have the last columns
};

// Null views are gradients nobody asked for.  Parameter gradients have the shape of their parameter.
struct BackwardOutput {
  View dquery, dkey, dvalue, dslopes, dtable, ddense_bias, dsink, drow_table, dcol_table;
};

struct BackwardInput {
  View grad_out, grad_lse, out, statistics;
  WeightsOutput grad_weights = {};  // null: the weights were not returned, or nobody used them
};

// How a kernel gets at the threads: run(context, i) for every i in [0, count), in any order, on any thread.
struct Parallel {
  i64 threads = 1;
  void (*run)(i64 count, void (*item)(void* context, i64 index), void* context) = nullptr;
};

}  // namespace fastattn
