// The CUDA library's face to PyTorch, as ../ops.cpp is the CPU library's: unpacks arguments into plain structs,
// allocates results and workspace with PyTorch's allocator, and launches on PyTorch's current stream.
//
// Nothing here waits for the device or allocates behind the allocator's back, so that every operator can be captured in
// a CUDA graph.  Everything goes through the stable ABI; the CUDA runtime is linked in, and shares the context that
// PyTorch has made current.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../unpack_rows.h"
#include "attention/launch.h"
#include "hopper/launch.h"
#include "rows/launch.h"
#include "workspace.h"

#ifndef FASTATTN_CUDA_ARCHS
#define FASTATTN_CUDA_ARCHS ""
#endif

namespace fastattn::cuda {
namespace {

void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("fastattn: CUDA: ") + cudaGetErrorString(status));
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

Device device_of(int index) {
  Device device;
  device.capability =
      10 * attribute(cudaDevAttrComputeCapabilityMajor, index) + attribute(cudaDevAttrComputeCapabilityMinor, index);
  device.shared_memory_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  device.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, index);
  return device;
}

// One operator call: its device is current while this lives, and its workspace is PyTorch's, given back to the
// allocator in stream order.
class Call : public Workspace {
 public:
  explicit Call(const Tensor& on) : Call(index_of(on)) {}

  const Place place;
  Device device;

  void* allocate(size_t bytes) override {
    const i64 count = static_cast<i64>((bytes + 3) / 4);
    blocks_.push_back(empty_strided(place, {count ? count : 1}, {1}, DType::kFloat32));
    return blocks_.back().data_ptr();
  }

  // The tensor itself where its rows are dense, and aligned if they have to be; else a copy that is.
  Tensor rows(const char* name, const Tensor& x, bool aligned = true) const {
    STD_TORCH_CHECK(x.dim() == 4, "fastattn: ", name, " must have 4 dimensions, got ", x.dim());
    const auto dtype = dtype_of(x);
    STD_TORCH_CHECK(dtype.has_value(), "fastattn: ", name, " has a dtype the kernels do not know");
    bool usable = x.size(3) <= 1 || x.stride(3) == 1;
    if (aligned) {
      usable = usable && reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
      for (i64 axis = 0; axis < 3; ++axis)
        usable = usable && (x.size(axis) <= 1 || x.stride(axis) * element_size(*dtype) % 16 == 0);
    }
    if (usable) return x;
    const i64 b = x.size(0), h = x.size(1), s = x.size(2), d = x.size(3);
    Tensor copy = empty_strided(place, {b, h, s, d}, {h * s * d, s * d, d, 1}, *dtype);
    torch::stable::copy_(copy, x);
    return copy;
  }

 private:
  explicit Call(int index)
      : place{"the CUDA device of the call", aoti_torch_device_type_cuda(), index},
        device(cached(index)),
        guard_(index) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
    device.stream = stream;
  }

  static int index_of(const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.is_cuda(), "fastattn: the operands must be CUDA tensors");
    return tensor.get_device_index();
  }

  // What does not change about a device is asked for once.
  static Device cached(int index) {
    static std::array<std::atomic<const Device*>, 64> known{};
    if (index < 0 || index >= static_cast<int>(known.size())) return device_of(index);
    const Device* device = known[index].load(std::memory_order_acquire);
    if (!device) {
      device = new Device(device_of(index));  // stays: two threads may make one each, of the same content
      known[index].store(device, std::memory_order_release);
    }
    return *device;
  }

  torch::stable::accelerator::DeviceGuard guard_;
  std::vector<Tensor> blocks_;
};

std::tuple<Tensor, Tensor, Tensor> cuda_forward(FASTATTN_PROBLEM_PARAMETERS) {
  Call call(query);
  const Tensor q = call.rows("query", query), k = call.rows("key", key), v = call.rows("value", value);
  const Problem p = unpack(call.place, q, k, v, FASTATTN_PROBLEM_FEATURES);
  const ForwardResults results(call.place, p, query);
  attention_forward(p, results.views, call, call.device);
  return results.take();
}

std::tuple<Tensor, Tensor> cuda_float8_forward(const OptionalTensor& query_scale, const OptionalTensor& key_scale,
                                               const OptionalTensor& value_scale, FASTATTN_PROBLEM_PARAMETERS) {
  Call call(query);
  const Tensor q = call.rows("query", query), k = call.rows("key", key), v = call.rows("value", value);
  const Problem p = unpack(call.place, q, k, v, FASTATTN_PROBLEM_FEATURES, /*eight_bits=*/true);
  const i64 b = p.batch, h = p.query_heads, s = p.query_length;
  const OperandScales scales{optional_view(call.place, "query_scale", query_scale, {-b, h}),
                             optional_view(call.place, "key_scale", key_scale, {-b, p.kv_heads}),
                             optional_view(call.place, "value_scale", value_scale, {-b, p.kv_heads})};
  const Tensor out = empty_like_layout(call.place, query, b, h, s, p.value_dim, DType::kBFloat16);
  const Tensor lse = empty_strided(call.place, {b, h, s}, {h * s, s, 1}, DType::kFloat32);
  const ForwardOutput views{output_view(call.place, p, out), view_of(call.place, "lse", lse, {b, h, s}), {}};
  hopper_e4m3_forward(p, scales, views, call, call.device);
  return {out, lse};
}

Gradients cuda_backward(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& out,
                        const Tensor& statistics, i64 needs, FASTATTN_PROBLEM_PARAMETERS) {
  Call call(query);
  const Tensor q = call.rows("query", query), k = call.rows("key", key), v = call.rows("value", value);
  const Tensor gradient = call.rows("grad_out", grad_out), output = call.rows("out", out);
  const Problem p = unpack(call.place, q, k, v, FASTATTN_PROBLEM_FEATURES);
  const BackwardInput in = unpack_backward(call.place, p, gradient, grad_lse, output, statistics);
  const BackwardResults results(call.place, p, needs, query, key, value);
  attention_backward(p, in, results.views, call, call.device);
  return results.take();
}

Tensor cuda_softmax_forward(const Tensor& scores, FASTATTN_SOFTMAX_PARAMETERS) {
  Call call(scores);
  const Problem p = unpack_softmax(call.place, scores, FASTATTN_SOFTMAX_ARGUMENTS);
  const Tensor source = call.rows("scores", scores, /*aligned=*/false);
  SoftmaxForward s;
  s.scores = scores_view(call.place, "scores", source, p);
  const Tensor out = empty_scores(call.place, p, s.scores.dtype);
  s.out = scores_view(call.place, "out", out, p);
  softmax_forward(p, s, call.device);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cuda_softmax_backward(const Tensor& grad_out, const Tensor& out, i64 needs,
                                                                 FASTATTN_SOFTMAX_PARAMETERS) {
  Call call(out);
  const Problem p = unpack_softmax(call.place, out, FASTATTN_SOFTMAX_ARGUMENTS);
  const Tensor output = call.rows("out", out, /*aligned=*/false);
  const Tensor gradient = call.rows("grad_out", grad_out, /*aligned=*/false);
  SoftmaxBackward s;
  s.out = scores_view(call.place, "out", output, p);
  s.grad_out = scores_view(call.place, "grad_out", gradient, p);
  require_dtype("grad_out", s.grad_out, s.out.dtype);
  const SoftmaxGradientResults results(call.place, p, needs, s);
  softmax_backward(p, s, call, call.device);
  return results.take();
}

void run_rotation(const Call& call, const Tensor& query_out, const Tensor& key_out, FASTATTN_ROTATION_PARAMETERS) {
  rotate(unpack_rotation(call.place, query_out, key_out, FASTATTN_ROTATION_ARGUMENTS), call.device);
}

std::tuple<Tensor, Tensor> cuda_rotate(FASTATTN_ROTATION_PARAMETERS) {
  const Call call(query);
  const auto results = empty_rotated(call.place, query, key);
  const Tensor q = call.rows("query", query, /*aligned=*/false), k = call.rows("key", key, /*aligned=*/false);
  run_rotation(call, std::get<0>(results), std::get<1>(results), q, k, cos, sin, positions, interleaved, conjugate);
  return results;
}

void cuda_rotate_(FASTATTN_ROTATION_PARAMETERS) {
  const Call call(query);
  run_rotation(call, query, key, FASTATTN_ROTATION_ARGUMENTS);
}

std::string cuda_plan(FASTATTN_PROBLEM_PARAMETERS) {
  const Call call(query);
  return plan_json(unpack(call.place, FASTATTN_PROBLEM_ARGUMENTS), call.device);
}

std::string cuda_float8_plan(FASTATTN_PROBLEM_PARAMETERS) {
  const Call call(query);
  return e4m3_plan_json(unpack(call.place, FASTATTN_PROBLEM_ARGUMENTS, /*eight_bits=*/true), call.device);
}

std::string cuda_info() {
  int runtime = 0;
  check(cudaRuntimeGetVersion(&runtime));
  return R"({"architectures": ")" FASTATTN_CUDA_ARCHS R"(", "runtime": ")" + std::to_string(runtime / 1000) + "." +
         std::to_string(runtime % 1000 / 10) + R"("})";
}

}  // namespace
}  // namespace fastattn::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fastattn, m) { m.def("cuda_info() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(fastattn, CompositeExplicitAutograd, m) {
  m.impl("cuda_info", TORCH_BOX(&fastattn::cuda::cuda_info));
}

STABLE_TORCH_LIBRARY_IMPL(fastattn, CUDA, m) {
  m.impl("cuda_forward", TORCH_BOX(&fastattn::cuda::cuda_forward));
  m.impl("cuda_float8_forward", TORCH_BOX(&fastattn::cuda::cuda_float8_forward));
  m.impl("cuda_float8_plan", TORCH_BOX(&fastattn::cuda::cuda_float8_plan));
  m.impl("cuda_backward", TORCH_BOX(&fastattn::cuda::cuda_backward));
  m.impl("cuda_plan", TORCH_BOX(&fastattn::cuda::cuda_plan));
  m.impl("cuda_softmax_forward", TORCH_BOX(&fastattn::cuda::cuda_softmax_forward));
  m.impl("cuda_softmax_backward", TORCH_BOX(&fastattn::cuda::cuda_softmax_backward));
  m.impl("cuda_rotate", TORCH_BOX(&fastattn::cuda::cuda_rotate));
  m.impl("cuda_rotate_", TORCH_BOX(&fastattn::cuda::cuda_rotate_));
}
