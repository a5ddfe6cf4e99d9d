#include "tensor_map.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace fastattn::cuda {

namespace {

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument("tensor map: " + what);
}

}  // namespace

TensorMap encode_tensor_map(const TensorLayout& layout) {
  require(layout.rank >= 1 && layout.rank <= 5, "the rank is " + std::to_string(layout.rank) + ", not 1 to 5");
  require(layout.data != nullptr && reinterpret_cast<uintptr_t>(layout.data) % 16 == 0,
          "the address is not a multiple of 16");
  sim::EncodedMap map{};
  map.mark = sim::EncodedMap::kMark;
  map.data = reinterpret_cast<uintptr_t>(layout.data);
  map.element_bytes = layout.element == TensorElement::kFloat ? 4 : layout.element == TensorElement::kByte ? 1 : 2;
  map.rank = static_cast<uint8_t>(layout.rank);
  map.swizzle = static_cast<uint8_t>(layout.swizzle);
  for (int axis = 0; axis < 5; ++axis) {
    const bool used = axis < layout.rank;
    const std::string name = "dimension " + std::to_string(axis);
    map.size[axis] = used ? layout.size[axis] : 1;
    map.box[axis] = static_cast<uint16_t>(used ? layout.box[axis] : 1);
    if (!used) continue;
    require(layout.size[axis] >= 1 && layout.size[axis] <= uint64_t{1} << 32,
            name + " has " + std::to_string(layout.size[axis]) + " elements, not 1 to 2^32");
    require(layout.box[axis] >= 1 && layout.box[axis] <= 256,
            name + " has a box of " + std::to_string(layout.box[axis]) + ", not 1 to 256");
    if (axis == 0) continue;
    const uint64_t stride = layout.stride_bytes[axis - 1];
    require(stride % 16 == 0 && stride < uint64_t{1} << 40,
            name + " has a stride of " + std::to_string(stride) + " bytes: not a multiple of 16 below 2^40");
    map.stride_bytes[axis - 1] = stride;
  }
  const int row = map.row_bytes();
  require(row % 16 == 0, "a row of the box has " + std::to_string(row) + " bytes: not a multiple of 16");
  if (layout.swizzle != Swizzle::kNone) {
    // The hardware takes narrower rows too; how it spaces them is nowhere used here.
    const int width = layout.swizzle == Swizzle::k128 ? 128 : layout.swizzle == Swizzle::k64 ? 64 : 32;
    require(row == width,
            "a row of the box has " + std::to_string(row) + " bytes, the swizzle " + std::to_string(width));
  }
  TensorMap result{};
  std::memcpy(&result, &map, sizeof map);
  return result;
}

}  // namespace fastattn::cuda
