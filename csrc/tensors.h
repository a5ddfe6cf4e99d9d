// Torch tensors as plain views, and results to write into, through the stable ABI: the same for every device.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>

#include "common/problem.h"

namespace fastattn {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Where the tensors of a call must lie, and its results are made.
struct Place {
  const char* name;
  int32_t type;
  int32_t index = -1;  // -1 = there is one only

  bool holds(const Tensor& tensor) const {
    int32_t found = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor.get(), &found));
    if (found != type || index < 0) return found == type;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &found));
    return found == index;
  }
};

inline std::optional<DType> dtype_of(const Tensor& tensor) {
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
    case ScalarType::Int:
      return DType::kInt32;
    case ScalarType::Long:
      return DType::kInt64;
    case ScalarType::Float8_e4m3fn:
      return kFloat8;
    default:
      return std::nullopt;
  }
}

// A view whose dimensions are `expected`, where -n (and so 0) allows 1 as well as n.  Dimensions of size one
// get stride zero: kernels broadcast without asking.
inline View view_of(const Place& place, const char* name, const Tensor& tensor, std::initializer_list<i64> expected) {
  View view;
  STD_TORCH_CHECK(place.holds(tensor), "fastattn: ", name, " must be a ", place.name,
                  " tensor on the device of the call");
  STD_TORCH_CHECK(tensor.dim() == static_cast<i64>(expected.size()), "fastattn: ", name, " must have ", expected.size(),
                  " dimensions, got ", tensor.dim());
  const auto dtype = dtype_of(tensor);
  STD_TORCH_CHECK(dtype.has_value(), "fastattn: ", name, " has a dtype the kernels do not know");
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

inline View optional_view(const Place& place, const char* name, const OptionalTensor& tensor,
                          std::initializer_list<i64> expected) {
  return tensor ? view_of(place, name, *tensor, expected) : View{};
}

inline void require_dtype(const char* name, const View& view, DType dtype) {
  STD_TORCH_CHECK(!view || view.dtype == dtype, "fastattn: ", name, " has the wrong dtype");
}

inline void require_dense_rows(const char* name, const View& view) {
  STD_TORCH_CHECK(view.size[3] <= 1 || view.stride[3] == 1, "fastattn: the last dimension of ", name, " must be dense");
}

inline i64 size_or(const OptionalTensor& tensor, i64 axis, i64 otherwise) {
  return tensor && tensor->dim() > axis ? tensor->size(axis) : otherwise;
}

inline int32_t scalar_type_code(DType dtype) {
  if (dtype == kFloat8) return aoti_torch_dtype_float8_e4m3fn();
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

inline Tensor empty_strided(const Place& place, std::initializer_list<i64> sizes, std::initializer_list<i64> strides,
                            DType dtype) {
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<i64>(sizes.size()), sizes.begin(), strides.begin(),
                                                         scalar_type_code(dtype), place.type,
                                                         place.index < 0 ? 0 : place.index, &handle));
  return Tensor(handle);
}

inline Tensor nothing(const Place& place, DType dtype) { return empty_strided(place, {0}, {1}, dtype); }

// (B, H, S, D) in the memory order of `like`: (B, S, H, D) where that is how the input lies, else contiguous.
inline Tensor empty_like_layout(const Place& place, const Tensor& like, i64 b, i64 h, i64 s, i64 d, DType dtype) {
  if (like.stride(1) < like.stride(2)) return empty_strided(place, {b, h, s, d}, {s * h * d, d, h * d, 1}, dtype);
  return empty_strided(place, {b, h, s, d}, {h * s * d, s * d, d, 1}, dtype);
}

inline Tensor empty_contiguous(const Place& place, const View& like, i64 axes) {
  const i64* n = like.size;
  if (axes == 2) return empty_strided(place, {n[0], n[1]}, {n[1], 1}, like.dtype);
  if (axes == 3) return empty_strided(place, {n[0], n[1], n[2]}, {n[1] * n[2], n[2], 1}, like.dtype);
  return empty_strided(place, {n[0], n[1], n[2], n[3]}, {n[1] * n[2] * n[3], n[2] * n[3], n[3], 1}, like.dtype);
}

}  // namespace fastattn
