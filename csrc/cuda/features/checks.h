// What every launcher checks before it launches.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "../../common/problem.h"
#include "params.h"

namespace fastattn::cuda {

inline constexpr i64 kMostBlocks = 0x7FFFFFFF;  // of a grid along x

inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }

inline int checked(const char* what, i64 count, i64 most = kMostBlocks) {
  if (count > most)
    throw std::runtime_error("fastattn: " + std::string(what) + " = " + std::to_string(count) + ", at most " +
                             std::to_string(most));
  return static_cast<int>(count);
}

inline Element element_of(const char* name, const View& view) {
  switch (view.dtype) {
    case DType::kFloat32:
      return Element::kFloat32;
    case DType::kFloat16:
      return Element::kFloat16;
    case DType::kBFloat16:
      return Element::kBFloat16;
    default:
      throw std::runtime_error("fastattn: " + std::string(name) + " must be float32, float16 or bfloat16");
  }
}

// Whether runs of `count` elements along the dense last dimension can be read in one access: every address is a
// multiple of its size.
inline bool in_runs(const View& view, i64 count) {
  if (view.size[3] > 1 && view.stride[3] != 1) return false;
  if (view.size[3] % count || reinterpret_cast<uintptr_t>(view.data) % (count * element_size(view.dtype))) return false;
  for (int axis = 0; axis < 3; ++axis)
    if (view.stride[axis] % count) return false;
  return true;
}

}  // namespace fastattn::cuda
