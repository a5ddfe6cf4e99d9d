// Tensor maps: how a tensor copy (hopper.h) finds a box of a tensor in global memory, and how it lays it out in shared
// memory.  Made on the host; the kernel gets them inside its parameters.  Needs no CUDA header.
#pragma once

#include <cstdint>

namespace fastattn::cuda {

// What the instructions take: 128 bytes that only cuTensorMapEncodeTiled, or the simulator, knows the meaning of.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// How a tile lies in shared memory: rows of 128, 64 or 32 bytes whose 16-byte chunks are permuted by the row.  The
// values are those of a matrix descriptor (hopper.h).
enum class Swizzle : uint64_t { kNone = 0, k128 = 1, k64 = 2, k32 = 3 };

enum class TensorElement : uint8_t { kHalf, kBFloat16, kFloat, kByte };

// The arguments of cuTensorMapEncodeTiled that a kernel here may choose.  The innermost dimension comes first and its
// elements are adjacent; what lies outside of the tensor is loaded as zero and not stored.
struct TensorLayout {
  const void* data = nullptr;  // a multiple of 16
  TensorElement element = TensorElement::kHalf;
  int rank = 0;                   // 1 to 5
  uint64_t size[5] = {};          // elements
  uint64_t stride_bytes[4] = {};  // of dimensions 1 to rank - 1: multiples of 16, below 2^40
  uint32_t box[5] = {};  // elements that one copy takes, at most 256 of each; the innermost at most the swizzle
  Swizzle swizzle = Swizzle::kNone;
};

// Throws std::invalid_argument with the reason where the hardware would not take the layout.
TensorMap encode_tensor_map(const TensorLayout& layout);

}  // namespace fastattn::cuda
