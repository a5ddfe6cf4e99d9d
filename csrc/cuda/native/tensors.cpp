#include "tensors.h"

#include <pybind11/stl.h>

#include <cstdint>
#include <string>

#include "../sim/simulator.h"

namespace py = pybind11;

namespace fastattn::cuda::native {

namespace {

std::string dtype_name(py::handle tensor) {
  const auto name = py::cast<std::string>(py::str(tensor.attr("dtype")));  // "torch.float16"
  return name.substr(name.rfind('.') + 1);
}

DType dtype_of(const char* name, py::handle tensor) {
  const std::string dtype = dtype_name(tensor);
  if (dtype == "float32") return DType::kFloat32;
  if (dtype == "float64") return DType::kFloat64;
  if (dtype == "bfloat16") return DType::kBFloat16;
  if (dtype == "float16") return DType::kFloat16;
  if (dtype == "bool") return DType::kBool;
  if (dtype == "int32") return DType::kInt32;
  if (dtype == "int64") return DType::kInt64;
  if (dtype == "float8_e4m3fn") return kFloat8;
  throw py::type_error(std::string(name) + " has dtype " + dtype + ", which the kernels do not know");
}

}  // namespace

Tensors::~Tensors() {
  for (const void* begin : registered_) sim::Memory::unregister_range(begin);
}

void* Tensors::address(const char* name, py::handle tensor, bool writable) {
  if (!py::hasattr(tensor, "data_ptr")) {
    throw py::type_error(std::string(name) + " must be a tensor, got " +
                         py::cast<std::string>(py::str(py::type::of(tensor))));
  }
  if (py::cast<std::string>(tensor.attr("device").attr("type")) != "cpu") {
    throw py::type_error(std::string(name) + " must be a CPU tensor");
  }
  const auto sizes = py::cast<std::vector<i64>>(tensor.attr("shape"));
  const auto strides = py::cast<std::vector<i64>>(tensor.attr("stride")());
  i64 elements = 1;
  for (size_t axis = 0; axis < sizes.size(); ++axis) {
    if (sizes[axis] == 0) elements = 0;
    if (elements != 0) elements += (sizes[axis] - 1) * strides[axis];
  }
  auto* begin = reinterpret_cast<void*>(py::cast<uintptr_t>(tensor.attr("data_ptr")()));
  const auto bytes = static_cast<size_t>(elements * py::cast<i64>(tensor.attr("element_size")()));
  if (bytes != 0) {
    sim::Memory::register_range(begin, bytes, writable, name);
    registered_.push_back(begin);
  }
  return begin;
}

View Tensors::view(const char* name, py::handle tensor, bool writable) {
  View view;
  if (tensor.is_none()) return view;
  view.data = address(name, tensor, writable);
  static const char nothing[64] = {};  // an empty tensor may have no address, yet it is not absent
  if (view.data == nullptr) view.data = nothing;
  view.dtype = dtype_of(name, tensor);
  const auto sizes = py::cast<std::vector<i64>>(tensor.attr("shape"));
  const auto strides = py::cast<std::vector<i64>>(tensor.attr("stride")());
  if (sizes.size() > 4) {
    throw py::type_error(std::string(name) + " has " + std::to_string(sizes.size()) +
                         " dimensions, at most 4 are known");
  }
  for (size_t axis = 0; axis < sizes.size(); ++axis) {
    view.size[axis] = sizes[axis];
    view.stride[axis] = sizes[axis] == 1 ? 0 : strides[axis];
  }
  return view;
}

Problem read_problem(Tensors& tensors, py::handle problem) {
  const auto view = [&](const char* name) { return tensors.read(name, problem.attr(name)); };
  const auto integer = [&](const char* name) { return py::cast<i64>(problem.attr(name)); };
  Problem p;
  p.query = view("query");
  p.key = view("key");
  p.value = view("value");
  p.batch = p.query.size[0], p.query_heads = p.query.size[1], p.query_length = p.query.size[2];
  p.head_dim = p.query.size[3];
  p.kv_heads = p.key.size[1], p.key_length = p.key.size[2], p.value_dim = p.value.size[3];
  p.scale = py::cast<double>(problem.attr("scale"));
  p.softcap = py::cast<double>(problem.attr("softcap"));
  p.query_cos = view("query_cos"), p.query_sin = view("query_sin");
  p.key_cos = view("key_cos"), p.key_sin = view("key_sin");
  p.interleaved = py::cast<bool>(problem.attr("interleaved"));
  p.query_offset = integer("query_offset");
  p.query_offsets = view("query_offsets");
  p.window_left = integer("window_left"), p.window_right = integer("window_right");
  p.key_lengths = view("key_lengths"), p.prefix_lengths = view("prefix_lengths");
  p.query_ids = view("query_ids"), p.key_ids = view("key_ids");
  p.dense_mask = view("dense_mask");
  p.slopes = view("slopes");
  p.table = view("table");
  p.table_left = integer("table_left");
  p.dense_bias = view("dense_bias");
  p.row_table = view("row_table"), p.col_table = view("col_table");
  p.columns = view("columns");
  p.columns_left = integer("columns_left");
  p.sink = view("sink");
  p.dropout_p = py::cast<double>(problem.attr("dropout_p"));
  if (p.dropout_p > 0) {
    const auto seed = py::cast<std::vector<i64>>(problem.attr("dropout_seed").attr("tolist")());
    p.seed = tensors.read("dropout_seed", problem.attr("dropout_seed"));
    p.dropout_seed = static_cast<uint64_t>(seed.at(0));
    p.dropout_offset = static_cast<uint32_t>(seed.at(1));
  }
  return p;
}

}  // namespace fastattn::cuda::native
