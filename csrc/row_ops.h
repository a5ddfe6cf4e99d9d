// The operators of the masked softmax and of the rotation.  A part of ops.cpp, which includes it behind its helpers.

namespace fastattn {
namespace {

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
Problem unpack_softmax(const Tensor& scores, FASTATTN_SOFTMAX_PARAMETERS) {
  STD_TORCH_CHECK(scores.dim() == 4, "fastattn: scores must have 4 dimensions");
  const auto dtype = dtype_of(scores);
  STD_TORCH_CHECK(dtype && *dtype != DType::kBool && *dtype != DType::kInt64,
                  "fastattn: scores must be floating point");
  const i64 b = scores.size(0), h = scores.size(1);
  const Tensor queries = empty_strided({b, h, scores.size(2), 0}, {1, 1, 1, 1}, *dtype);
  const Tensor keys = empty_strided({b, h, scores.size(3), 0}, {1, 1, 1, 1}, *dtype);
  return unpack(queries, keys, keys, scale, 0.0, {}, {}, {}, {}, false, query_offset, query_offsets, window_left,
                window_right, key_lengths, prefix_lengths, query_ids, key_ids, dense_mask, slopes, table, table_left,
                dense_bias, {}, 0.0, {});
}

View scores_view(const char* name, const Tensor& tensor, const Problem& p) {
  return view_of(name, tensor, {p.batch, p.query_heads, p.query_length, p.key_length});
}

Tensor empty_scores(const Problem& p, DType dtype) {
  const i64 h = p.query_heads, sq = p.query_length, sk = p.key_length;
  return empty_strided({p.batch, h, sq, sk}, {h * sq * sk, sq * sk, sk, 1}, dtype);
}

Tensor cpu_softmax_forward(const Tensor& scores, FASTATTN_SOFTMAX_PARAMETERS) {
  const Problem p = unpack_softmax(scores, FASTATTN_SOFTMAX_ARGUMENTS);
  SoftmaxForward s;
  s.scores = scores_view("scores", scores, p);
  const Tensor out = empty_scores(p, s.scores.dtype);
  s.out = scores_view("out", out, p);
  if (p.key_length) cpu::kernels().softmax_forward(p, s, threads());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cpu_softmax_backward(const Tensor& grad_out, const Tensor& out, i64 needs,
                                                                FASTATTN_SOFTMAX_PARAMETERS) {
  const Problem p = unpack_softmax(out, FASTATTN_SOFTMAX_ARGUMENTS);
  SoftmaxBackward s;
  s.out = scores_view("out", out, p);
  s.grad_out = scores_view("grad_out", grad_out, p);
  const DType dtype = s.out.dtype;
  require_dtype("grad_out", s.grad_out, dtype);
  Tensor dscores = nothing(dtype), dslopes = nothing(dtype), dtable = nothing(dtype), dbias = nothing(dtype);
  if (needs & 1) {
    dscores = empty_scores(p, dtype);
    s.dscores = scores_view("dscores", dscores, p);
  }
  if (needs & 2 && p.slopes) {
    dslopes = empty_contiguous(p.slopes, 2);
    s.dslopes = view_of("dslopes", dslopes, {p.slopes.size[0], p.query_heads});
  }
  if (needs & 4 && p.table) {
    dtable = empty_contiguous(p.table, 3);
    s.dtable = view_of("dtable", dtable, {p.table.size[0], p.query_heads, p.table.size[2]});
  }
  if (needs & 8 && p.dense_bias) {
    dbias = empty_contiguous(p.dense_bias, 4);
    const i64* n = p.dense_bias.size;
    s.ddense_bias = view_of("ddense_bias", dbias, {n[0], n[1], n[2], n[3]});
  }
  cpu::kernels().softmax_backward(p, s, threads());
  return {dscores, dslopes, dtable, dbias};
}

#define FASTATTN_ROTATION_PARAMETERS                                                                             \
  const Tensor &query, const Tensor &key, const Tensor &cos, const Tensor &sin, const OptionalTensor &positions, \
      bool interleaved, bool conjugate

void run_rotation(const Tensor& query_out, const Tensor& key_out, FASTATTN_ROTATION_PARAMETERS) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4, "fastattn: query and key must have 4 dimensions");
  STD_TORCH_CHECK(cos.dim() == 3, "fastattn: cos must have 3 dimensions");
  const i64 b = query.size(0), s = query.size(2), d = query.size(3), rows = cos.size(1), half = cos.size(2);
  Rotation r;
  r.from[0] = view_of("query", query, {b, query.size(1), s, d});
  r.from[1] = view_of("key", key, {b, key.size(1), s, d});
  r.to[0] = view_of("query", query_out, {b, query.size(1), s, d});
  r.to[1] = view_of("key", key_out, {b, key.size(1), s, d});
  const DType dtype = r.from[0].dtype, parameter = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  STD_TORCH_CHECK(dtype != DType::kBool && dtype != DType::kInt64, "fastattn: query must be floating point");
  require_dtype("key", r.from[1], dtype);
  require_dense_rows("query", r.to[0]);
  require_dense_rows("key", r.to[1]);
  r.cos = view_of("cos", cos, {-b, rows, half});
  r.sin = view_of("sin", sin, {-b, rows, half});
  require_dtype("cos", r.cos, parameter);
  require_dtype("sin", r.sin, parameter);
  STD_TORCH_CHECK(2 * half <= d && (rows > 0 || s == 0),
                  "fastattn: cos must have rows, and at most half as many columns as query");
  r.positions = optional_view("positions", positions, {-b, s});
  require_dtype("positions", r.positions, DType::kInt64);
  r.interleaved = interleaved;
  r.conjugate = conjugate;
  if (b && s && d) cpu::kernels().rotate(r, threads());
}

std::tuple<Tensor, Tensor> cpu_rotate(FASTATTN_ROTATION_PARAMETERS) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4, "fastattn: query and key must have 4 dimensions");
  const auto dtype = dtype_of(query);
  STD_TORCH_CHECK(dtype.has_value(), "fastattn: query has a dtype the CPU kernels do not know");
  const auto like = [&](const Tensor& x) {
    return empty_like_layout(x, x.size(0), x.size(1), x.size(2), x.size(3), *dtype);
  };
  const Tensor query_out = like(query), key_out = like(key);
  run_rotation(query_out, key_out, query, key, cos, sin, positions, interleaved, conjugate);
  return {query_out, key_out};
}

void cpu_rotate_(FASTATTN_ROTATION_PARAMETERS) {
  run_rotation(query, key, query, key, cos, sin, positions, interleaved, conjugate);
}

}  // namespace
}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("cpu_softmax_forward", TORCH_BOX(&fastattn::cpu_softmax_forward));
  m.impl("cpu_softmax_backward", TORCH_BOX(&fastattn::cpu_softmax_backward));
  m.impl("cpu_rotate", TORCH_BOX(&fastattn::cpu_rotate));
  m.impl("cpu_rotate_", TORCH_BOX(&fastattn::cpu_rotate_));
}
