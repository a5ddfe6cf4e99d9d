// The arguments of the attention operators as a Problem, checked for what memory safety rests on, and their results.
#pragma once

#include <tuple>

#include "tensors.h"

namespace fastattn {

// Of slopes, tables, sinks, rotary tables and lse.
inline DType parameter_dtype(DType dtype) { return dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32; }

// The fields of fastattn.problem.Problem, in order.
#define FASTATTN_PROBLEM_PARAMETERS                                                                                \
  const Tensor &query, const Tensor &key, const Tensor &value, double scale, double softcap,                       \
      const OptionalTensor &query_cos, const OptionalTensor &query_sin, const OptionalTensor &key_cos,             \
      const OptionalTensor &key_sin, bool interleaved, i64 query_offset, const OptionalTensor &query_offsets,      \
      i64 window_left, i64 window_right, const OptionalTensor &key_lengths, const OptionalTensor &prefix_lengths,  \
      const OptionalTensor &query_ids, const OptionalTensor &key_ids, const OptionalTensor &dense_mask,            \
      const OptionalTensor &slopes, const OptionalTensor &table, i64 table_left, const OptionalTensor &dense_bias, \
      const OptionalTensor &row_table, const OptionalTensor &col_table, const OptionalTensor &columns,             \
      i64 columns_left, const OptionalTensor &sink, double dropout_p, const OptionalTensor &dropout_seed
#define FASTATTN_PROBLEM_FEATURES                                                                                \
  scale, softcap, query_cos, query_sin, key_cos, key_sin, interleaved, query_offset, query_offsets, window_left, \
      window_right, key_lengths, prefix_lengths, query_ids, key_ids, dense_mask, slopes, table, table_left,      \
      dense_bias, row_table, col_table, columns, columns_left, sink, dropout_p, dropout_seed
#define FASTATTN_PROBLEM_ARGUMENTS query, key, value, FASTATTN_PROBLEM_FEATURES

// Those of a problem that has no tensors beside its operands: fastattn.problem.PLAIN_FIELDS.
#define FASTATTN_PLAIN_PARAMETERS                                                                              \
  const Tensor &query, const Tensor &key, const Tensor &value, double scale, double softcap, i64 query_offset, \
      i64 window_left, i64 window_right
#define FASTATTN_PLAIN_ARGUMENTS query, key, value, scale, softcap, query_offset, window_left, window_right

inline bool is_floating(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat64 || dtype == DType::kBFloat16 || dtype == DType::kFloat16;
}

// Row and column tables, and the columns they are read at.
inline void unpack_content(const Place& place, Problem& p, const OptionalTensor& row_table,
                           const OptionalTensor& col_table, const OptionalTensor& columns, i64 columns_left) {
  const DType parameter = parameter_dtype(p.query.dtype);
  const i64 wide = size_or(row_table, 3, size_or(col_table, 2, 0));
  p.row_table = optional_view(place, "row_table", row_table, {p.batch, p.query_heads, p.query_length, wide});
  p.col_table = optional_view(place, "col_table", col_table, {p.batch, p.kv_heads, wide, p.key_length});
  for (const auto& [name, view] : {std::pair{"row_table", &p.row_table}, std::pair{"col_table", &p.col_table}}) {
    if (!*view) continue;
    require_dtype(name, *view, parameter);
    require_dense_rows(name, *view);
  }
  STD_TORCH_CHECK(wide > 0 || !(p.row_table || p.col_table), "fastattn: row_table and col_table must not be empty");
  p.columns_left = columns_left;
  if (!(p.row_table || p.col_table) || !columns) return;
  p.columns = view_of(place, "columns", *columns, {size_or(columns, 0, 0)});
  require_dtype("columns", p.columns, DType::kInt32);
  STD_TORCH_CHECK(p.columns.size[0] > 0 && (p.columns.size[0] == 1 || p.columns.stride[0] == 1),
                  "fastattn: columns must be dense and not empty");
  if (place.type != aoti_torch_device_type_cpu()) return;
  const int32_t* const column = reinterpret_cast<const int32_t*>(p.columns.data);
  for (i64 t = 0; t < p.columns.size[0]; ++t)
    STD_TORCH_CHECK(column[t] >= (t ? column[t - 1] : 0) && column[t] < wide, "fastattn: columns[", t,
                    "] = ", column[t], ", expected columns of the tables, of which there are ", wide,
                    ", that never fall");
}

inline Problem unpack_plain(const Place& place, FASTATTN_PLAIN_PARAMETERS, bool eight_bits = false) {
  Problem p;
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                  "fastattn: query, key and value must have 4 dimensions");
  const i64 b = p.batch = query.size(0), hq = p.query_heads = query.size(1), sq = p.query_length = query.size(2);
  const i64 d = p.head_dim = query.size(3), hk = p.kv_heads = key.size(1), sk = p.key_length = key.size(2);
  const i64 dv = p.value_dim = value.size(3);
  STD_TORCH_CHECK(hk == 0 ? hq == 0 : hq % hk == 0, "fastattn: ", hq, " query heads cannot share ", hk, " key heads");
  p.query = view_of(place, "query", query, {b, hq, sq, d});
  p.key = view_of(place, "key", key, {b, hk, sk, d});
  p.value = view_of(place, "value", value, {b, hk, sk, dv});
  require_dense_rows("query", p.query);
  require_dense_rows("key", p.key);
  require_dense_rows("value", p.value);
  const DType dtype = p.query.dtype;
  STD_TORCH_CHECK(eight_bits ? dtype == kFloat8 : is_floating(dtype), "fastattn: query must be ",
                  eight_bits ? "float8_e4m3fn" : "floating point");
  require_dtype("key", p.key, dtype);
  require_dtype("value", p.value, dtype);
  p.scale = scale;
  p.softcap = softcap;
  p.query_offset = query_offset;
  p.window_left = window_left;
  p.window_right = window_right;
  return p;
}

inline Problem unpack(const Place& place, FASTATTN_PROBLEM_PARAMETERS, bool eight_bits = false) {
  Problem p = unpack_plain(place, FASTATTN_PLAIN_ARGUMENTS, eight_bits);
  const i64 b = p.batch, hq = p.query_heads, sq = p.query_length, sk = p.key_length, d = p.head_dim;
  const DType parameter = parameter_dtype(p.query.dtype);
  const auto rotation = [&](const char* name, const OptionalTensor& tensor, const OptionalTensor& like) {
    View view = optional_view(place, name, tensor, {-b, size_or(like, 1, 0), size_or(like, 2, 0)});
    require_dtype(name, view, parameter);
    STD_TORCH_CHECK(!view || (2 * view.size[2] <= d && (view.size[1] > 0 || (sq == 0 && sk == 0))), "fastattn: ", name,
                    " must have rows, and at most half as many columns as query");
    return view;
  };
  p.query_cos = rotation("query_cos", query_cos, query_cos);
  p.query_sin = rotation("query_sin", query_sin, query_cos);
  p.key_cos = rotation("key_cos", key_cos, key_cos);
  p.key_sin = rotation("key_sin", key_sin, key_cos);
  STD_TORCH_CHECK(!p.query_cos == !p.query_sin && !p.key_cos == !p.key_sin,
                  "fastattn: rotation needs cosines and sines together");
  p.interleaved = interleaved;

  const auto integers = [&](const char* name, const OptionalTensor& tensor, std::initializer_list<i64> shape) {
    View view = optional_view(place, name, tensor, shape);
    require_dtype(name, view, DType::kInt64);
    return view;
  };
  p.query_offsets = integers("query_offsets", query_offsets, {-b});
  p.key_lengths = integers("key_lengths", key_lengths, {-b});
  p.prefix_lengths = integers("prefix_lengths", prefix_lengths, {-b});
  p.query_ids = integers("query_ids", query_ids, {-b, sq});
  p.key_ids = integers("key_ids", key_ids, {-b, sk});
  STD_TORCH_CHECK(!p.query_ids == !p.key_ids, "fastattn: query_ids and key_ids come together");
  p.dense_mask = optional_view(place, "dense_mask", dense_mask, {-b, -hq, -sq, -sk});
  require_dtype("dense_mask", p.dense_mask, DType::kBool);

  p.slopes = optional_view(place, "slopes", slopes, {-b, hq});
  require_dtype("slopes", p.slopes, parameter);
  p.table = optional_view(place, "table", table, {-b, hq, size_or(table, 2, 0)});
  require_dtype("table", p.table, parameter);
  STD_TORCH_CHECK(!p.table || p.table.size[2] > 0, "fastattn: table must not be empty");
  p.table_left = table_left;
  p.dense_bias = optional_view(place, "dense_bias", dense_bias, {-b, -hq, -sq, -sk});
  STD_TORCH_CHECK(!p.dense_bias || is_floating(p.dense_bias.dtype), "fastattn: dense_bias must be floating point");
  unpack_content(place, p, row_table, col_table, columns, columns_left);
  p.sink = optional_view(place, "sink", sink, {-b, hq});
  require_dtype("sink", p.sink, parameter);

  p.dropout_p = dropout_p;
  if (dropout_p > 0) {
    STD_TORCH_CHECK(dropout_seed.has_value(), "fastattn: dropout needs dropout_seed");
    p.seed = integers("dropout_seed", dropout_seed, {2});
    if (place.type == aoti_torch_device_type_cpu()) {  // elsewhere a look at it would wait for the device
      p.dropout_seed = static_cast<uint64_t>(*reinterpret_cast<const i64*>(p.seed.at(0)));
      p.dropout_offset = static_cast<uint32_t>(*reinterpret_cast<const i64*>(p.seed.at(1)));
    }
  }
  return p;
}

inline Tensor empty_output(const Place& place, const Problem& p, const Tensor& query) {
  return empty_like_layout(place, query, p.batch, p.query_heads, p.query_length, p.value_dim, p.query.dtype);
}

inline View output_view(const Place& place, const Problem& p, const Tensor& out) {
  return view_of(place, "out", out, {p.batch, p.query_heads, p.query_length, p.value_dim});
}

// Results of the forward operator and the views that kernels write them through.
struct ForwardResults {
  Tensor out, lse, statistics;
  ForwardOutput views;

  ForwardResults(const Place& place, const Problem& p, const Tensor& query)
      : out(empty_output(place, p, query)),
        lse(empty_strided(place, {p.batch, p.query_heads, p.query_length},
                          {p.query_heads * p.query_length, p.query_length, 1}, parameter_dtype(p.query.dtype))),
        statistics(empty_strided(place, {p.batch, p.query_heads, p.query_length, 2},
                                 {p.query_heads * p.query_length * 2, p.query_length * 2, 2, 1},
                                 parameter_dtype(p.query.dtype))) {
    views.out = output_view(place, p, out);
    views.lse = view_of(place, "lse", lse, {p.batch, p.query_heads, p.query_length});
    views.statistics = view_of(place, "statistics", statistics, {p.batch, p.query_heads, p.query_length, 2});
  }

  std::tuple<Tensor, Tensor, Tensor> take() const { return {out, lse, statistics}; }
};

inline BackwardInput unpack_backward(const Place& place, const Problem& p, const Tensor& grad_out,
                                     const OptionalTensor& grad_lse, const Tensor& out, const Tensor& statistics) {
  const i64 b = p.batch, hq = p.query_heads, sq = p.query_length, dv = p.value_dim;
  const DType dtype = p.query.dtype, parameter = parameter_dtype(dtype);
  BackwardInput in;
  in.grad_out = view_of(place, "grad_out", grad_out, {b, hq, sq, dv});
  in.out = view_of(place, "out", out, {b, hq, sq, dv});
  in.statistics = view_of(place, "statistics", statistics, {b, hq, sq, 2});
  in.grad_lse = optional_view(place, "grad_lse", grad_lse, {b, hq, sq});
  require_dtype("grad_out", in.grad_out, dtype);
  require_dtype("out", in.out, dtype);
  require_dtype("statistics", in.statistics, parameter);
  require_dtype("grad_lse", in.grad_lse, parameter);
  return in;
}

// Results of the backward operator: those that `needs` asks for, and empty tensors.  Every one is a tensor of its own:
// operators must not return aliases.
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

struct BackwardResults {
  BackwardOutput views;
  Tensor query, key, value, slopes, table, bias, sink, row_table, col_table;

  BackwardResults(const Place& place, const Problem& p, i64 needs, const Tensor& like_query, const Tensor& like_key,
                  const Tensor& like_value)
      : query(operand(place, needs & 1, "dquery", p.query, like_query, views.dquery)),
        key(operand(place, needs >> 1 & 1, "dkey", p.key, like_key, views.dkey)),
        value(operand(place, needs >> 2 & 1, "dvalue", p.value, like_value, views.dvalue)),
        slopes(parameter(place, needs >> 3 & 1, "dslopes", p.slopes, 2, views.dslopes, p)),
        table(parameter(place, needs >> 4 & 1, "dtable", p.table, 3, views.dtable, p)),
        bias(p.dense_bias && needs >> 5 & 1 ? like(place, "ddense_bias", p.dense_bias, 4, views.ddense_bias)
                                            : nothing(place, p.query.dtype)),
        sink(parameter(place, needs >> 6 & 1, "dsink", p.sink, 2, views.dsink, p)),
        row_table(parameter(place, needs >> 7 & 1, "drow_table", p.row_table, 4, views.drow_table, p)),
        col_table(parameter(place, needs >> 8 & 1, "dcol_table", p.col_table, 4, views.dcol_table, p)) {}

  Gradients take() const { return {query, key, value, slopes, table, bias, sink, row_table, col_table}; }

  // A contiguous gradient in its parameter's shape.
  static Tensor like(const Place& place, const char* name, const View& parameter, i64 axes, View& view) {
    const Tensor gradient = empty_contiguous(place, parameter, axes);
    const i64* n = parameter.size;
    if (axes == 2) view = view_of(place, name, gradient, {n[0], n[1]});
    if (axes == 3) view = view_of(place, name, gradient, {n[0], n[1], n[2]});
    if (axes == 4) view = view_of(place, name, gradient, {n[0], n[1], n[2], n[3]});
    return gradient;
  }

 private:
  static Tensor operand(const Place& place, bool wanted, const char* name, const View& of, const Tensor& order,
                        View& view) {
    if (!wanted) return nothing(place, of.dtype);
    const i64* n = of.size;
    const Tensor gradient = empty_like_layout(place, order, n[0], n[1], n[2], n[3], of.dtype);
    view = view_of(place, name, gradient, {n[0], n[1], n[2], n[3]});
    return gradient;
  }

  static Tensor parameter(const Place& place, bool wanted, const char* name, const View& of, i64 axes, View& view,
                          const Problem& p) {
    return wanted && of ? like(place, name, of, axes, view) : nothing(place, parameter_dtype(p.query.dtype));
  }
};

}  // namespace fastattn
