// The operators of additive attention.  A part of ops.cpp, which includes it behind its helpers.

namespace fastattn {
namespace {

View weight_view(const char* name, const Tensor& weight, const Problem& p) {
  const View view = view_of(name, weight, {-p.batch, p.query_heads, p.head_dim});
  require_dtype(name, view, p.query.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32);
  return view;
}

std::tuple<Tensor, Tensor, Tensor> cpu_additive_forward(const Tensor& weight, FASTATTN_PROBLEM_PARAMETERS) {
  const Problem p = unpack(FASTATTN_PROBLEM_ARGUMENTS);
  const View w = weight_view("weight", weight, p);
  const i64 b = p.batch, h = p.query_heads, s = p.query_length;
  Tensor out = empty_like_layout(query, b, h, s, p.value_dim, p.query.dtype);
  Tensor lse = empty_strided({b, h, s}, {h * s, s, 1}, w.dtype);
  Tensor statistics = empty_strided({b, h, s, 2}, {h * s * 2, s * 2, 2, 1}, w.dtype);
  if (b && h && s) {
    ForwardOutput o;
    o.out = view_of("out", out, {b, h, s, p.value_dim});
    o.lse = view_of("lse", lse, {b, h, s});
    o.statistics = view_of("statistics", statistics, {b, h, s, 2});
    cpu::kernels().additive_forward(p, w, o, threads());
  }
  return {out, lse, statistics};
}

// Gradients in the order of fastattn.additive_problem.ADDITIVE_GRADIENT_FIELDS.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cpu_additive_backward(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& out, const Tensor& statistics, i64 needs,
    const Tensor& weight, FASTATTN_PROBLEM_PARAMETERS) {
  const Problem p = unpack(FASTATTN_PROBLEM_ARGUMENTS);
  const View w = weight_view("weight", weight, p);
  const DType dtype = p.query.dtype, parameter = w.dtype;
  const i64 b = p.batch, hq = p.query_heads, sq = p.query_length, hk = p.kv_heads, sk = p.key_length;
  const i64 d = p.head_dim, dv = p.value_dim;
  BackwardInput in;
  in.grad_out = view_of("grad_out", grad_out, {b, hq, sq, dv});
  in.out = view_of("out", out, {b, hq, sq, dv});
  in.statistics = view_of("statistics", statistics, {b, hq, sq, 2});
  in.grad_lse = optional_view("grad_lse", grad_lse, {b, hq, sq});
  require_dtype("grad_out", in.grad_out, dtype);
  require_dtype("out", in.out, dtype);
  require_dtype("statistics", in.statistics, parameter);
  require_dtype("grad_lse", in.grad_lse, parameter);
  STD_TORCH_CHECK(in.statistics.size[3] == 2 && in.statistics.stride[3] == 1, "fastattn: statistics must be pairs");

  const auto wanted = [&](int bit, const View& of) { return (needs >> bit & 1) && of; };
  BackwardOutput o;
  View dw;
  // Every output is a tensor of its own: operators must not return aliases.
  Tensor dquery = nothing(dtype), dkey = nothing(dtype), dvalue = nothing(dtype), dbias = nothing(dtype);
  Tensor dweight = nothing(parameter), dslopes = nothing(parameter), dtable = nothing(parameter);
  if (wanted(0, w)) {
    dweight = empty_contiguous(w, 3);
    dw = view_of("dweight", dweight, {w.size[0], hq, d});
  }
  if (wanted(1, p.query)) {
    dquery = empty_like_layout(query, b, hq, sq, d, dtype);
    o.dquery = view_of("dquery", dquery, {b, hq, sq, d});
  }
  if (wanted(2, p.key)) {
    dkey = empty_like_layout(key, b, hk, sk, d, dtype);
    o.dkey = view_of("dkey", dkey, {b, hk, sk, d});
  }
  if (wanted(3, p.value)) {
    dvalue = empty_like_layout(value, b, hk, sk, dv, dtype);
    o.dvalue = view_of("dvalue", dvalue, {b, hk, sk, dv});
  }
  if (wanted(4, p.slopes)) {
    dslopes = empty_contiguous(p.slopes, 2);
    o.dslopes = view_of("dslopes", dslopes, {p.slopes.size[0], hq});
  }
  if (wanted(5, p.table)) {
    dtable = empty_contiguous(p.table, 3);
    o.dtable = view_of("dtable", dtable, {p.table.size[0], hq, p.table.size[2]});
  }
  if (wanted(6, p.dense_bias)) {
    dbias = empty_contiguous(p.dense_bias, 4);
    const i64* n = p.dense_bias.size;
    o.ddense_bias = view_of("ddense_bias", dbias, {n[0], n[1], n[2], n[3]});
  }
  cpu::kernels().additive_backward(p, w, in, o, dw, threads());
  return {dweight, dquery, dkey, dvalue, dslopes, dtable, dbias};
}

}  // namespace
}  // namespace fastattn

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("cpu_additive_forward", TORCH_BOX(&fastattn::cpu_additive_forward));
  m.impl("cpu_additive_backward", TORCH_BOX(&fastattn::cpu_additive_backward));
}
