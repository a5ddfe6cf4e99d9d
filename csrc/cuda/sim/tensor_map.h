// Tensor maps as the simulator encodes them, and the walk over a box.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../arch/tensor_map.h"

namespace fastattn::cuda::sim {

// What lies in the 128 bytes.
struct EncodedMap {
  uint64_t mark;
  uint64_t data;
  uint64_t size[5];
  uint64_t stride_bytes[4];
  uint16_t box[5];
  uint8_t element_bytes;
  uint8_t rank;
  uint8_t swizzle;

  static constexpr uint64_t kMark = 0x70616D726F736E74;

  int row_bytes() const { return box[0] * element_bytes; }
  int rows() const { return box[1] * box[2] * box[3] * box[4]; }
};
static_assert(sizeof(EncodedMap) <= sizeof(TensorMap));

// The address at which the hardware keeps what a tile has at `address`: bits 4 to 6 take in bits 7 to 9, or as many of
// them as the swizzle's width has.  `base` is the descriptor's base offset, for patterns that do not begin at zero.
inline uint32_t swizzled(uint32_t address, Swizzle swizzle, uint32_t base = 0) {
  const uint32_t mask = swizzle == Swizzle::k128 ? 7 : swizzle == Swizzle::k64 ? 3 : swizzle == Swizzle::k32 ? 1 : 0;
  return address ^ ((((address >> 7) - base) & mask) << 4);
}

// A box's row along the innermost dimension: of its bytes, those from `first` to `last` lie inside the tensor, at
// `data`; the others are zero.
struct BoxRow {
  uint8_t* data;
  int first, last;
};

// Calls f(number of the row, BoxRow) for all rows of the box at `at`.
template <class F>
void for_box_rows(const EncodedMap& map, const int (&at)[5], F f) {
  const int64_t begin = at[0], end = begin + map.box[0], size = static_cast<int64_t>(map.size[0]);
  const int64_t low = std::clamp<int64_t>(0, begin, end), high = std::clamp<int64_t>(size, low, end);
  int row = 0;
  for (int i4 = 0; i4 < map.box[4]; ++i4) {
    for (int i3 = 0; i3 < map.box[3]; ++i3) {
      for (int i2 = 0; i2 < map.box[2]; ++i2) {
        for (int i1 = 0; i1 < map.box[1]; ++i1) {
          const int64_t index[4] = {int64_t{at[1]} + i1, int64_t{at[2]} + i2, int64_t{at[3]} + i3, int64_t{at[4]} + i4};
          bool inside = low < high;
          uint64_t address = map.data + static_cast<uint64_t>(low * map.element_bytes);
          for (int axis = 1; axis < map.rank; ++axis) {
            inside = inside && index[axis - 1] >= 0 && index[axis - 1] < static_cast<int64_t>(map.size[axis]);
            address += static_cast<uint64_t>(index[axis - 1]) * map.stride_bytes[axis - 1];
          }
          BoxRow result{nullptr, 0, 0};
          if (inside) {
            result = {reinterpret_cast<uint8_t*>(address), static_cast<int>(low - begin) * map.element_bytes,
                      static_cast<int>(high - begin) * map.element_bytes};
          }
          f(row++, result);
        }
      }
    }
  }
}

}  // namespace fastattn::cuda::sim
