// The arguments of the operators beside attention as plain data, checked for what memory safety rests on, and their
// results.
#pragma once

#include <tuple>

#include "common/rows.h"
#include "unpack.h"

namespace fastattn {

// The features of fastattn.softmax_problem.SoftmaxProblem, in order.
#define FASTATTN_SOFTMAX_PARAMETERS                                                                             \
  double scale, i64 query_offset, const OptionalTensor &query_offsets, i64 window_left, i64 window_right,       \
      const OptionalTensor &key_lengths, const OptionalTensor &prefix_lengths, const OptionalTensor &query_ids, \
      const OptionalTensor &key_ids, const OptionalTensor &dense_mask, const OptionalTensor &slopes,            \
      const OptionalTensor &table, i64 table_left, const OptionalTensor &dense_bias
#define FASTATTN_SOFTMAX_ARGUMENTS                                                                                \
  scale, query_offset, query_offsets, window_left, window_right, key_lengths, prefix_lengths, query_ids, key_ids, \
      dense_mask, slopes, table, table_left, dense_bias

// The same checks as attention's: as a problem with these sizes whose query, key and value have no width.
inline Problem unpack_softmax(const Place& place, const Tensor& scores, FASTATTN_SOFTMAX_PARAMETERS) {
  STD_TORCH_CHECK(scores.dim() == 4, "fastattn: scores must have 4 dimensions");
  const auto dtype = dtype_of(scores);
  STD_TORCH_CHECK(dtype && is_floating(*dtype), "fastattn: scores must be floating point");
  const i64 b = scores.size(0), h = scores.size(1);
  const Tensor queries = empty_strided(place, {b, h, scores.size(2), 0}, {1, 1, 1, 1}, *dtype);
  const Tensor keys = empty_strided(place, {b, h, scores.size(3), 0}, {1, 1, 1, 1}, *dtype);
  return unpack(place, queries, keys, keys, scale, 0.0, {}, {}, {}, {}, false, query_offset, query_offsets, window_left,
                window_right, key_lengths, prefix_lengths, query_ids, key_ids, dense_mask, slopes, table, table_left,
                dense_bias, {}, {}, {}, 0, {}, 0.0, {});
}

inline View scores_view(const Place& place, const char* name, const Tensor& tensor, const Problem& p) {
  return view_of(place, name, tensor, {p.batch, p.query_heads, p.query_length, p.key_length});
}

inline Tensor empty_scores(const Place& place, const Problem& p, DType dtype) {
  const i64 h = p.query_heads, sq = p.query_length, sk = p.key_length;
  return empty_strided(place, {p.batch, h, sq, sk}, {h * sq * sk, sq * sk, sk, 1}, dtype);
}

// Results of the softmax's backward operator, as BackwardResults.
struct SoftmaxGradientResults {
  Tensor scores, slopes, table, bias;

  // Fills in the views of the gradients.
  SoftmaxGradientResults(const Place& place, const Problem& p, i64 needs, SoftmaxBackward& views)
      : scores(nothing(place, views.out.dtype)),
        slopes(nothing(place, views.out.dtype)),
        table(nothing(place, views.out.dtype)),
        bias(nothing(place, views.out.dtype)) {
    if (needs & 1) {
      scores = empty_scores(place, p, views.out.dtype);
      views.dscores = scores_view(place, "dscores", scores, p);
    }
    if (needs & 2 && p.slopes) slopes = BackwardResults::like(place, "dslopes", p.slopes, 2, views.dslopes);
    if (needs & 4 && p.table) table = BackwardResults::like(place, "dtable", p.table, 3, views.dtable);
    if (needs & 8 && p.dense_bias)
      bias = BackwardResults::like(place, "ddense_bias", p.dense_bias, 4, views.ddense_bias);
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> take() const { return {scores, slopes, table, bias}; }
};

#define FASTATTN_ROTATION_PARAMETERS                                                                             \
  const Tensor &query, const Tensor &key, const Tensor &cos, const Tensor &sin, const OptionalTensor &positions, \
      bool interleaved, bool conjugate

#define FASTATTN_ROTATION_ARGUMENTS query, key, cos, sin, positions, interleaved, conjugate

inline Rotation unpack_rotation(const Place& place, const Tensor& query_out, const Tensor& key_out,
                                FASTATTN_ROTATION_PARAMETERS) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4, "fastattn: query and key must have 4 dimensions");
  STD_TORCH_CHECK(cos.dim() == 3, "fastattn: cos must have 3 dimensions");
  const i64 b = query.size(0), s = query.size(2), d = query.size(3), rows = cos.size(1), half = cos.size(2);
  Rotation r;
  r.from[0] = view_of(place, "query", query, {b, query.size(1), s, d});
  r.from[1] = view_of(place, "key", key, {b, key.size(1), s, d});
  r.to[0] = view_of(place, "query", query_out, {b, query.size(1), s, d});
  r.to[1] = view_of(place, "key", key_out, {b, key.size(1), s, d});
  const DType dtype = r.from[0].dtype, parameter = parameter_dtype(dtype);
  STD_TORCH_CHECK(is_floating(dtype), "fastattn: query must be floating point");
  require_dtype("key", r.from[1], dtype);
  require_dense_rows("query", r.to[0]);
  require_dense_rows("key", r.to[1]);
  r.cos = view_of(place, "cos", cos, {-b, rows, half});
  r.sin = view_of(place, "sin", sin, {-b, rows, half});
  require_dtype("cos", r.cos, parameter);
  require_dtype("sin", r.sin, parameter);
  STD_TORCH_CHECK(2 * half <= d && (rows > 0 || s == 0),
                  "fastattn: cos must have rows, and at most half as many columns as query");
  r.positions = optional_view(place, "positions", positions, {-b, s});
  require_dtype("positions", r.positions, DType::kInt64);
  r.interleaved = interleaved;
  r.conjugate = conjugate;
  return r;
}

// Tensors for the rotated query and key.
inline std::tuple<Tensor, Tensor> empty_rotated(const Place& place, const Tensor& query, const Tensor& key) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4, "fastattn: query and key must have 4 dimensions");
  const auto dtype = dtype_of(query);
  STD_TORCH_CHECK(dtype.has_value(), "fastattn: query has a dtype the kernels do not know");
  const auto like = [&](const Tensor& x) {
    return empty_like_layout(place, x, x.size(0), x.size(1), x.size(2), x.size(3), *dtype);
  };
  return {like(query), like(key)};
}

}  // namespace fastattn
