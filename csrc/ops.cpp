// The CPU library's face to PyTorch: unpacks arguments into plain structs, allocates the results and lends the kernels
// PyTorch's threads.  Schemas are declared in Python (fastattn/ops.py); only implementations are registered here.
// Everything goes through the stable ABI, so one binary serves every PyTorch from 2.10 on.
#include <atomic>
#include <new>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "unpack_rows.h"

namespace fastattn {
namespace {

const Place kCpu{"the CPU", aoti_torch_device_type_cpu()};

void run_here(i64 count, void (*item)(void*, i64), void* context) {
  for (i64 i = 0; i < count; ++i) item(context, i);
}

// Items are taken one by one, the first ones (the long ones of a causal mask) first: the order of arrival balances the
// threads.  Of many short items each thread has a stretch of its own before it helps the others: repeated calls, and
// the operators around them, find the same rows in a core's cache.  No result depends on who does what.
struct alignas(64) Stretch {
  std::atomic<i64> next;
  i64 end;
};

void run_parallel(i64 count, void (*item)(void*, i64), void* context) {
  if (count <= 0) return;
  const i64 threads = std::min<i64>(count, torch::stable::get_num_threads());
  if (threads <= 1) return run_here(count, item, context);
  const i64 parts = count >= 32 * threads ? threads : 1;
  std::vector<Stretch> stretches(parts);
  for (i64 t = 0; t < parts; ++t) {
    stretches[t].next = count * t / parts;
    stretches[t].end = count * (t + 1) / parts;
  }
  std::atomic<bool> out_of_memory{false};
  torch::stable::parallel_for(0, threads, 1, [&](i64 self, i64) {
    try {
      for (i64 t = self; t < self + parts; ++t) {
        Stretch& stretch = stretches[t % parts];
        for (i64 i = stretch.next++; i < stretch.end; i = stretch.next++) item(context, i);
      }
    } catch (...) {  // must not cross the C boundary of parallel_for; it is the only thing an item throws (cpu/arena.h)
      out_of_memory = true;
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

Parallel threads() { return {static_cast<i64>(torch::stable::get_num_threads()), run_parallel}; }

// The calling thread alone where the others would not have woken up before it is done.
Parallel threads_for(const Problem& p) {
  constexpr double kFew = 1 << 15;  // multiply-adds, a microsecond or two
  const double rows = static_cast<double>(p.batch * p.query_heads) * p.query_length;
  return rows * p.key_length * (p.head_dim + p.value_dim) <= kFew ? Parallel{1, run_here} : threads();
}

// Attention of operands and numbers alone, for calls that need the output alone.
Tensor cpu_plain_forward(FASTATTN_PLAIN_PARAMETERS) {
  const Problem p = unpack_plain(kCpu, FASTATTN_PLAIN_ARGUMENTS);
  const Tensor out = empty_output(kCpu, p, query);
  ForwardOutput views;
  views.out = output_view(kCpu, p, out);
  if (p.batch && p.query_heads && p.query_length) cpu::kernels().forward(p, views, threads_for(p));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> cpu_forward(FASTATTN_PROBLEM_PARAMETERS) {
  const Problem p = unpack(kCpu, FASTATTN_PROBLEM_ARGUMENTS);
  const ForwardResults results(kCpu, p, query);
  if (p.batch && p.query_heads && p.query_length) cpu::kernels().forward(p, results.views, threads_for(p));
  return results.take();
}

Gradients cpu_backward(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& out,
                       const Tensor& statistics, i64 needs, FASTATTN_PROBLEM_PARAMETERS) {
  const Problem p = unpack(kCpu, FASTATTN_PROBLEM_ARGUMENTS);
  const BackwardInput in = unpack_backward(kCpu, p, grad_out, grad_lse, out, statistics);
  const BackwardResults results(kCpu, p, needs, query, key, value);
  cpu::kernels().backward(p, in, results.views, threads_for(p));
  return results.take();
}

WeightsOutput weights_output(const char* name, const Tensor& tensor, const Problem& p, bool average, i64 leading) {
  WeightsOutput w;
  w.view = view_of(kCpu, name, tensor, {p.batch, average ? 1 : p.query_heads, p.query_length, p.key_length});
  require_dtype(name, w.view, p.query.dtype);
  STD_TORCH_CHECK(0 <= leading && leading <= p.key_length, "fastattn: leading must be a number of keys, got ", leading);
  w.average = average;
  w.leading = leading;
  return w;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cpu_weights_forward(bool average, i64 leading, FASTATTN_PROBLEM_PARAMETERS) {
  const Problem p = unpack(kCpu, FASTATTN_PROBLEM_ARGUMENTS);
  const ForwardResults results(kCpu, p, query);
  const i64 heads = average ? 1 : p.query_heads, sq = p.query_length, sk = p.key_length;
  const Tensor weights =
      empty_strided(kCpu, {p.batch, heads, sq, sk}, {heads * sq * sk, sq * sk, sk, 1}, p.query.dtype);
  const WeightsOutput w = weights_output("weights", weights, p, average, leading);
  if (p.batch && sq) cpu::kernels().weights_forward(p, results.views, w, threads());
  return {results.out, results.lse, results.statistics, weights};
}

Gradients cpu_weights_backward(const Tensor& grad_out, const Tensor& grad_weights, const Tensor& out,
                               const Tensor& statistics, i64 needs, bool average, i64 leading,
                               FASTATTN_PROBLEM_PARAMETERS) {
  const Problem p = unpack(kCpu, FASTATTN_PROBLEM_ARGUMENTS);
  BackwardInput in = unpack_backward(kCpu, p, grad_out, {}, out, statistics);
  in.grad_weights = weights_output("grad_weights", grad_weights, p, average, leading);
  const BackwardResults results(kCpu, p, needs, query, key, value);
  cpu::kernels().backward(p, in, results.views, threads());
  return results.take();
}

Tensor cpu_softmax_forward(const Tensor& scores, FASTATTN_SOFTMAX_PARAMETERS) {
  const Problem p = unpack_softmax(kCpu, scores, FASTATTN_SOFTMAX_ARGUMENTS);
  SoftmaxForward s;
  s.scores = scores_view(kCpu, "scores", scores, p);
  const Tensor out = empty_scores(kCpu, p, s.scores.dtype);
  s.out = scores_view(kCpu, "out", out, p);
  if (p.key_length) cpu::kernels().softmax_forward(p, s, threads());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cpu_softmax_backward(const Tensor& grad_out, const Tensor& out, i64 needs,
                                                                FASTATTN_SOFTMAX_PARAMETERS) {
  const Problem p = unpack_softmax(kCpu, out, FASTATTN_SOFTMAX_ARGUMENTS);
  SoftmaxBackward s;
  s.out = scores_view(kCpu, "out", out, p);
  s.grad_out = scores_view(kCpu, "grad_out", grad_out, p);
  require_dtype("grad_out", s.grad_out, s.out.dtype);
  const SoftmaxGradientResults results(kCpu, p, needs, s);
  cpu::kernels().softmax_backward(p, s, threads());
  return results.take();
}

View weight_view(const char* name, const Tensor& weight, const Problem& p) {
  const View view = view_of(kCpu, name, weight, {-p.batch, p.query_heads, p.head_dim});
  require_dtype(name, view, parameter_dtype(p.query.dtype));
  STD_TORCH_CHECK(!p.row_table && !p.col_table, "fastattn: additive attention takes no row_table and no col_table");
  return view;
}

std::tuple<Tensor, Tensor, Tensor> cpu_additive_forward(const Tensor& weight, FASTATTN_PROBLEM_PARAMETERS) {
  const Problem p = unpack(kCpu, FASTATTN_PROBLEM_ARGUMENTS);
  const View w = weight_view("weight", weight, p);
  const ForwardResults results(kCpu, p, query);
  if (p.batch && p.query_heads && p.query_length) cpu::kernels().additive_forward(p, w, results.views, threads());
  return results.take();
}

// Gradients in the order of fastattn.additive_problem.ADDITIVE_GRADIENT_FIELDS: weight, then attention's without a
// sink.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cpu_additive_backward(
    const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& out, const Tensor& statistics, i64 needs,
    const Tensor& weight, FASTATTN_PROBLEM_PARAMETERS) {
  const Problem p = unpack(kCpu, FASTATTN_PROBLEM_ARGUMENTS);
  const View w = weight_view("weight", weight, p);
  const BackwardInput in = unpack_backward(kCpu, p, grad_out, grad_lse, out, statistics);
  STD_TORCH_CHECK(in.statistics.stride[3] == 1, "fastattn: statistics must be pairs");
  const BackwardResults results(kCpu, p, needs >> 1, query, key, value);
  View dw;
  const Tensor dweight = needs & 1 ? BackwardResults::like(kCpu, "dweight", w, 3, dw) : nothing(kCpu, w.dtype);
  cpu::kernels().additive_backward(p, w, in, results.views, dw, threads());
  return {dweight, results.query, results.key, results.value, results.slopes, results.table, results.bias};
}

void run_rotation(const Tensor& query_out, const Tensor& key_out, FASTATTN_ROTATION_PARAMETERS) {
  const Rotation r = unpack_rotation(kCpu, query_out, key_out, FASTATTN_ROTATION_ARGUMENTS);
  if (r.from[0].size[0] && r.from[0].size[2] && r.from[0].size[3]) cpu::kernels().rotate(r, threads());
}

std::tuple<Tensor, Tensor> cpu_rotate(FASTATTN_ROTATION_PARAMETERS) {
  const auto results = empty_rotated(kCpu, query, key);
  run_rotation(std::get<0>(results), std::get<1>(results), FASTATTN_ROTATION_ARGUMENTS);
  return results;
}

void cpu_rotate_(FASTATTN_ROTATION_PARAMETERS) { run_rotation(query, key, FASTATTN_ROTATION_ARGUMENTS); }

std::string cpu_plan(FASTATTN_PROBLEM_PARAMETERS) {
  const Problem p = unpack(kCpu, FASTATTN_PROBLEM_ARGUMENTS);
  const i64 count = threads_for(p).threads;
  const auto plan = cpu::kernels().plan(p, count);
  const std::pair<const char*, i64> entries[] = {{"query_rows", plan.query_rows},
                                                 {"heads", plan.heads},
                                                 {"keys", plan.keys},
                                                 {"work_items", plan.items},
                                                 {"scratch_bytes_per_thread", plan.scratch_bytes},
                                                 {"threads", count}};
  std::string json = "{";
  for (const auto& [name, value] : entries)
    json += (json.size() > 1 ? ", \"" : "\"") + std::string(name) + "\": " + std::to_string(value);
  return json + "}";
}

std::string cpu_info() { return cpu::describe(); }

// What one core does at best in the arithmetic of the tensor's dtype, as JSON.
std::string cpu_roofline(const Tensor& like, double seconds) {
  const auto dtype = dtype_of(like);
  STD_TORCH_CHECK(dtype && is_floating(*dtype), "fastattn: like must be floating point");
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
  Tensor out = empty_strided(kCpu, {n}, {1}, DType::kFloat32);
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
  m.impl("cpu_plain_forward", TORCH_BOX(&fastattn::cpu_plain_forward));
  m.impl("cpu_forward", TORCH_BOX(&fastattn::cpu_forward));
  m.impl("cpu_backward", TORCH_BOX(&fastattn::cpu_backward));
  m.impl("cpu_weights_forward", TORCH_BOX(&fastattn::cpu_weights_forward));
  m.impl("cpu_weights_backward", TORCH_BOX(&fastattn::cpu_weights_backward));
  m.impl("cpu_plan", TORCH_BOX(&fastattn::cpu_plan));
  m.impl("cpu_softmax_forward", TORCH_BOX(&fastattn::cpu_softmax_forward));
  m.impl("cpu_softmax_backward", TORCH_BOX(&fastattn::cpu_softmax_backward));
  m.impl("cpu_additive_forward", TORCH_BOX(&fastattn::cpu_additive_forward));
  m.impl("cpu_additive_backward", TORCH_BOX(&fastattn::cpu_additive_backward));
  m.impl("cpu_rotate", TORCH_BOX(&fastattn::cpu_rotate));
  m.impl("cpu_rotate_", TORCH_BOX(&fastattn::cpu_rotate_));
  m.impl("cpu_roofline", TORCH_BOX(&fastattn::cpu_roofline));
  m.impl("cpu_exp2", TORCH_BOX(&fastattn::cpu_exp2));
}
