// The library's face to PyTorch, and the only file that includes its headers: unpacks arguments into plain structs,
// checks what memory safety rests on, allocates the results and lends the kernels PyTorch's threads.
// Schemas are declared in Python (fastattn/ops.py); only implementations are registered here.  Everything goes
// through the stable ABI, so one binary serves every PyTorch from 2.10 on.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <atomic>
#include <exception>
#include <initializer_list>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>

#include "common/problem.h"
#include "cpu/dispatch.h"

namespace fastattn {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

std::optional<DType> dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::Bool:
      return DType::kBool;
    case ScalarType::Long:
      return DType::kInt64;
    default:
      return std::nullopt;
  }
}

// A view whose dimensions are `expected`, where -n (and so 0) allows 1 as well as n.  Dimensions of size one
// get stride zero: kernels broadcast without asking.
View view_of(const char* name, const Tensor& tensor, std::initializer_list<i64> expected) {
  View view;
  STD_TORCH_CHECK(tensor.is_cpu(), "fastattn: ", name, " must be a CPU tensor");
  STD_TORCH_CHECK(tensor.dim() == static_cast<i64>(expected.size()), "fastattn: ", name, " must have ", expected.size(),
                  " dimensions, got ", tensor.dim());
  const auto dtype = dtype_of(tensor);
  STD_TORCH_CHECK(dtype.has_value(), "fastattn: ", name, " has a dtype the CPU kernels do not know");
  view.dtype = *dtype;
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  i64 axis = 0;
  for (const i64 want : expected) {
    const i64 size = sizes[axis];
    const bool fits = want > 0 ? size == want : size == 1 || size == -want;
    STD_TORCH_CHECK(fits, "fastattn: ", name, " has size ", size, " in dimension ", axis, ", expected ",
                    want >= 0 ? want : -want);
    view.size[axis] = size;
    view.stride[axis] = size == 1 ? 0 : strides[axis];
    ++axis;
  }
  static const char nothing[64] = {};  // an empty tensor may have no address, yet it is not absent
  view.data = tensor.data_ptr();
  if (!view.data) view.data = nothing;
  return view;
}

View optional_view(const char* name, const OptionalTensor& tensor, std::initializer_list<i64> expected) {
  return tensor ? view_of(name, *tensor, expected) : View{};
}

void require_dtype(const char* name, const View& view, DType dtype) {
  STD_TORCH_CHECK(!view || view.dtype == dtype, "fastattn: ", name, " has the wrong dtype");
}

void require_dense_rows(const char* name, const View& view) {
  STD_TORCH_CHECK(view.size[3] <= 1 || view.stride[3] == 1, "fastattn: the last dimension of ", name, " must be dense");
}

i64 size_or(const OptionalTensor& tensor, i64 axis, i64 otherwise) {
  return tensor && tensor->dim() > axis ? tensor->size(axis) : otherwise;
}

// The fields of fastattn.problem.Problem, in order.
#define FASTATTN_PROBLEM_PARAMETERS                                                                                \
  const Tensor &query, const Tensor &key, const Tensor &value, double scale, double softcap,                       \
      const OptionalTensor &query_cos, const OptionalTensor &query_sin, const OptionalTensor &key_cos,             \
      const OptionalTensor &key_sin, bool interleaved, i64 query_offset, const OptionalTensor &query_offsets,      \
      i64 window_left, i64 window_right, const OptionalTensor &key_lengths, const OptionalTensor &prefix_lengths,  \
      const OptionalTensor &query_ids, const OptionalTensor &key_ids, const OptionalTensor &dense_mask,            \
      const OptionalTensor &slopes, const OptionalTensor &table, i64 table_left, const OptionalTensor &dense_bias, \
      const OptionalTensor &sink, double dropout_p, const OptionalTensor &dropout_seed
#define FASTATTN_PROBLEM_ARGUMENTS                                                                                     \
  query, key, value, scale, softcap, query_cos, query_sin, key_cos, key_sin, interleaved, query_offset, query_offsets, \
      window_left, window_right, key_lengths, prefix_lengths, query_ids, key_ids, dense_mask, slopes, table,           \
      table_left, dense_bias, sink, dropout_p, dropout_seed

Problem unpack(FASTATTN_PROBLEM_PARAMETERS) {
  Problem p;
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && value.dim() == 4,
                  "fastattn: query, key and value must have 4 dimensions");
  const i64 b = p.batch = query.size(0), hq = p.query_heads = query.size(1), sq = p.query_length = query.size(2);
  const i64 d = p.head_dim = query.size(3), hk = p.kv_heads = key.size(1), sk = p.key_length = key.size(2);
  const i64 dv = p.value_dim = value.size(3);
  STD_TORCH_CHECK(hk == 0 ? hq == 0 : hq % hk == 0, "fastattn: ", hq, " query heads cannot share ", hk, " key heads");
  p.query = view_of("query", query, {b, hq, sq, d});
  p.key = view_of("key", key, {b, hk, sk, d});
  p.value = view_of("value", value, {b, hk, sk, dv});
  require_dense_rows("query", p.query);
  require_dense_rows("key", p.key);
  require_dense_rows("value", p.value);
  const DType dtype = p.query.dtype;
  STD_TORCH_CHECK(dtype != DType::kBool && dtype != DType::kInt64, "fastattn: query must be floating point");
  require_dtype("key", p.key, dtype);
  require_dtype("value", p.value, dtype);
  p.scale = scale;
  p.softcap = softcap;

  const DType parameter = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  const auto rotation = [&](const char* name, const OptionalTensor& tensor, const OptionalTensor& like) {
    View view = optional_view(name, tensor, {-b, size_or(like, 1, 0), size_or(like, 2, 0)});
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
    View view = optional_view(name, tensor, shape);
    require_dtype(name, view, DType::kInt64);
    return view;
  };
  p.query_offset = query_offset;
  p.query_offsets = integers("query_offsets", query_offsets, {-b});
  p.window_left = window_left;
  p.window_right = window_right;
  p.key_lengths = integers("key_lengths", key_lengths, {-b});
  p.prefix_lengths = integers("prefix_lengths", prefix_lengths, {-b});
  p.query_ids = integers("query_ids", query_ids, {-b, sq});
  p.key_ids = integers("key_ids", key_ids, {-b, sk});
  STD_TORCH_CHECK(!p.query_ids == !p.key_ids, "fastattn: query_ids and key_ids come together");
  p.dense_mask = optional_view("dense_mask", dense_mask, {-b, -hq, -sq, -sk});
  require_dtype("dense_mask", p.dense_mask, DType::kBool);

  p.slopes = optional_view("slopes", slopes, {-b, hq});
  require_dtype("slopes", p.slopes, parameter);
  p.table = optional_view("table", table, {-b, hq, size_or(table, 2, 0)});
  require_dtype("table", p.table, parameter);
  STD_TORCH_CHECK(!p.table || p.table.size[2] > 0, "fastattn: table must not be empty");
  p.table_left = table_left;
  p.dense_bias = optional_view("dense_bias", dense_bias, {-b, -hq, -sq, -sk});
  STD_TORCH_CHECK(!p.dense_bias || (p.dense_bias.dtype != DType::kBool && p.dense_bias.dtype != DType::kInt64),
                  "fastattn: dense_bias must be floating point");
  p.sink = optional_view("sink", sink, {-b, hq});
  require_dtype("sink", p.sink, parameter);

  p.dropout_p = dropout_p;
  if (dropout_p > 0) {
    STD_TORCH_CHECK(dropout_seed.has_value(), "fastattn: dropout needs dropout_seed");
    const View seed = integers("dropout_seed", dropout_seed, {2});
    p.dropout_seed = static_cast<uint64_t>(*reinterpret_cast<const i64*>(seed.at(0)));
    p.dropout_offset = static_cast<uint32_t>(*reinterpret_cast<const i64*>(seed.at(1)));
  }
  return p;
}

int32_t scalar_type_code(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return aoti_torch_dtype_float64();
    case DType::kBFloat16:
      return aoti_torch_dtype_bfloat16();
    case DType::kFloat16:
      return aoti_torch_dtype_float16();
    default:
      return aoti_torch_dtype_float32();
  }
}

Tensor empty_strided(std::initializer_list<i64> sizes, std::initializer_list<i64> strides, DType dtype) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<i64>(sizes.size()), sizes.begin(), strides.begin(),
                                                         scalar_type_code(dtype), aoti_torch_device_type_cpu(), 0,
                                                         &handle));
  return Tensor(handle);
}

Tensor nothing(DType dtype) { return empty_strided({0}, {1}, dtype); }

// (B, H, S, D) in the memory order of `like`: (B, S, H, D) where that is how the input lies, else contiguous.
Tensor empty_like_layout(const Tensor& like, i64 b, i64 h, i64 s, i64 d, DType dtype) {
  if (like.stride(1) < like.stride(2)) return empty_strided({b, h, s, d}, {s * h * d, d, h * d, 1}, dtype);
  return empty_strided({b, h, s, d}, {h * s * d, s * d, d, 1}, dtype);
}

Tensor empty_contiguous(const View& like, i64 axes) {
  const i64* n = like.size;
  if (axes == 2) return empty_strided({n[0], n[1]}, {n[1], 1}, like.dtype);
  if (axes == 3) return empty_strided({n[0], n[1], n[2]}, {n[1] * n[2], n[2], 1}, like.dtype);
  return empty_strided({n[0], n[1], n[2], n[3]}, {n[1] * n[2] * n[3], n[2] * n[3], n[3], 1}, like.dtype);
}

// Hands out [0, count) one by one: the order of arrival balances the threads, and no result depends on it.
void run_parallel(i64 count, void (*item)(void*, i64), void* context) {
  if (count <= 0) return;
  const i64 threads = std::min<i64>(count, torch::stable::get_num_threads());
  if (threads <= 1) {
    for (i64 i = 0; i < count; ++i) item(context, i);
    return;
  }
  std::atomic<i64> next{0};
  std::exception_ptr failure;
  std::mutex failure_lock;
  torch::stable::parallel_for(0, threads, 1, [&](i64, i64) {
    try {
      for (i64 i = next.fetch_add(1); i < count; i = next.fetch_add(1)) item(context, i);
    } catch (...) {  // an exception must not cross the C boundary of parallel_for
      const std::lock_guard<std::mutex> guard(failure_lock);
      if (!failure) failure = std::current_exception();
    }
  });
  if (failure) std::rethrow_exception(failure);
}

Parallel threads() { return {static_cast<i64>(torch::stable::get_num_threads()), run_parallel}; }

std::tuple<Tensor, Tensor, Tensor> cpu_forward(FASTATTN_PROBLEM_PARAMETERS) {
  const Problem p = unpack(FASTATTN_PROBLEM_ARGUMENTS);
  const DType parameter = p.query.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  Tensor out = empty_like_layout(query, p.batch, p.query_heads, p.query_length, p.value_dim, p.query.dtype);
  Tensor lse = empty_strided({p.batch, p.query_heads, p.query_length},
                             {p.query_heads * p.query_length, p.query_length, 1}, parameter);
  Tensor statistics = empty_strided({p.batch, p.query_heads, p.query_length, 2},
                                    {p.query_heads * p.query_length * 2, p.query_length * 2, 2, 1}, parameter);
  if (p.batch && p.query_heads && p.query_length) {
    ForwardOutput o;
    o.out = view_of("out", out, {p.batch, p.query_heads, p.query_length, p.value_dim});
    o.lse = view_of("lse", lse, {p.batch, p.query_heads, p.query_length});
    o.statistics = view_of("statistics", statistics, {p.batch, p.query_heads, p.query_length, 2});
    cpu::kernels().forward(p, o, threads());
  }
  return {out, lse, statistics};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cpu_backward(const Tensor& grad_out,
                                                                                const OptionalTensor& grad_lse,
                                                                                const Tensor& out,
                                                                                const Tensor& statistics, i64 needs,
                                                                                FASTATTN_PROBLEM_PARAMETERS) {
  const Problem p = unpack(FASTATTN_PROBLEM_ARGUMENTS);
  const DType dtype = p.query.dtype;
  const i64 b = p.batch, hq = p.query_heads, sq = p.query_length, dv = p.value_dim;
  BackwardInput in;
  in.grad_out = view_of("grad_out", grad_out, {b, hq, sq, dv});
  in.out = view_of("out", out, {b, hq, sq, dv});
  in.statistics = view_of("statistics", statistics, {b, hq, sq, 2});
  in.grad_lse = optional_view("grad_lse", grad_lse, {b, hq, sq});
  const DType parameter = dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  require_dtype("grad_out", in.grad_out, dtype);
  require_dtype("out", in.out, dtype);
  require_dtype("statistics", in.statistics, parameter);
  require_dtype("grad_lse", in.grad_lse, parameter);

  const auto wanted = [&](int bit, const View& of) { return (needs >> bit & 1) && of; };
  BackwardOutput o;
  // Every output is a tensor of its own: operators must not return aliases.
  Tensor dq = nothing(dtype), dk = nothing(dtype), dv_ = nothing(dtype), dbias = nothing(dtype);
  Tensor dslopes = nothing(parameter), dtable = nothing(parameter), dsink = nothing(parameter);
  if (wanted(0, p.query)) {
    dq = empty_like_layout(query, b, hq, sq, p.head_dim, dtype);
    o.dquery = view_of("dquery", dq, {b, hq, sq, p.head_dim});
  }
  if (wanted(1, p.key)) {
    dk = empty_like_layout(key, b, p.kv_heads, p.key_length, p.head_dim, dtype);
    o.dkey = view_of("dkey", dk, {b, p.kv_heads, p.key_length, p.head_dim});
  }
  if (wanted(2, p.value)) {
    dv_ = empty_like_layout(value, b, p.kv_heads, p.key_length, dv, dtype);
    o.dvalue = view_of("dvalue", dv_, {b, p.kv_heads, p.key_length, dv});
  }
  if (wanted(3, p.slopes)) {
    dslopes = empty_contiguous(p.slopes, 2);
    o.dslopes = view_of("dslopes", dslopes, {p.slopes.size[0], hq});
  }
  if (wanted(4, p.table)) {
    dtable = empty_contiguous(p.table, 3);
    o.dtable = view_of("dtable", dtable, {p.table.size[0], hq, p.table.size[2]});
  }
  if (wanted(5, p.dense_bias)) {
    dbias = empty_contiguous(p.dense_bias, 4);
    const i64* n = p.dense_bias.size;
    o.ddense_bias = view_of("ddense_bias", dbias, {n[0], n[1], n[2], n[3]});
  }
  if (wanted(6, p.sink)) {
    dsink = empty_contiguous(p.sink, 2);
    o.dsink = view_of("dsink", dsink, {p.sink.size[0], hq});
  }
  cpu::kernels().backward(p, in, o, threads());
  return {dq, dk, dv_, dslopes, dtable, dbias, dsink};
}

std::string cpu_plan(FASTATTN_PROBLEM_PARAMETERS) {
  const auto plan = cpu::kernels().plan(unpack(FASTATTN_PROBLEM_ARGUMENTS), threads().threads);
  const std::pair<const char*, i64> entries[] = {{"query_rows", plan.query_rows},
                                                 {"heads", plan.heads},
                                                 {"keys", plan.keys},
                                                 {"work_items", plan.items},
                                                 {"scratch_bytes_per_thread", plan.scratch_bytes},
                                                 {"threads", threads().threads}};
  std::string json = "{";
  for (const auto& [name, value] : entries)
    json += (json.size() > 1 ? ", \"" : "\"") + std::string(name) + "\": " + std::to_string(value);
  return json + "}";
}

std::string cpu_info() { return cpu::describe(); }

// What one core does at best in the arithmetic of the tensor's dtype, as JSON.
std::string cpu_roofline(const Tensor& like, double seconds) {
  const auto dtype = dtype_of(like);
  STD_TORCH_CHECK(dtype && *dtype != DType::kBool && *dtype != DType::kInt64, "fastattn: like must be floating point");
  const cpu::Roofline r = cpu::kernels().roofline(*dtype, seconds);
  const std::pair<const char*, double> entries[] = {{"peak_flops", r.peak},
                                                    {"scores_flops_64", r.scores[0]},
                                                    {"values_flops_64", r.values[0]},
                                                    {"scores_flops_128", r.scores[1]},
                                                    {"values_flops_128", r.values[1]},
                                                    {"weights_per_s", r.weights}};
  std::string json = "{";
  for (const auto& [name, value] : entries)
    json += (json.size() > 1 ? ", \"" : "\"") + std::string(name) + "\": " + std::to_string(value);
  return json + "}";
}

// The kernels' own 2^x, for the test of its error bound.
Tensor cpu_exp2(const Tensor& x, bool coarse) {
  const i64 n = x.numel();
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && n % 16 == 0,
                  "fastattn: x must be contiguous float32, a multiple of 16 elements");
  Tensor out = empty_strided({n}, {1}, DType::kFloat32);
  cpu::kernels().exp2(static_cast<const float*>(x.data_ptr()), static_cast<float*>(out.data_ptr()), n, coarse);
  return out;
}

}  // namespace
}  // namespace fastattn

STABLE_TORCH_LIBRARY_FRAGMENT(fastattn, m) {
  m.def("cpu_info() -> str");
  m.def("cpu_roofline(Tensor like, float seconds) -> str");
  m.def("cpu_exp2(Tensor x, bool coarse) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CompositeExplicitAutograd, m) {
  m.impl("cpu_info", TORCH_BOX(&fastattn::cpu_info));
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CPU, m) {
  m.impl("cpu_forward", TORCH_BOX(&fastattn::cpu_forward));
  m.impl("cpu_backward", TORCH_BOX(&fastattn::cpu_backward));
  m.impl("cpu_plan", TORCH_BOX(&fastattn::cpu_plan));
  m.impl("cpu_roofline", TORCH_BOX(&fastattn::cpu_roofline));
  m.impl("cpu_exp2", TORCH_BOX(&fastattn::cpu_exp2));
}

#include "row_ops.h"
