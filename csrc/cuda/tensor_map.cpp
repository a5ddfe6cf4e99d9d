// Tensor maps on a GPU: the driver encodes them.  It is asked for through the runtime, so that nothing links to it.
#include "arch/tensor_map.h"

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime_api.h>

#include <bit>
#include <stdexcept>
#include <string>

namespace fastattn::cuda {
namespace {

PFN_cuTensorMapEncodeTiled_v12000 encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
    if (status != cudaSuccess || result != cudaDriverEntryPointSuccess)
      throw std::runtime_error("fastattn: the driver has no cuTensorMapEncodeTiled; it must be of CUDA 12 or newer");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return found;
}

CUtensorMapDataType type_of(TensorElement element) {
  switch (element) {
    case TensorElement::kHalf:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
    case TensorElement::kBFloat16:
      return CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    case TensorElement::kByte:
      return CU_TENSOR_MAP_DATA_TYPE_UINT8;
    default:
      return CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  }
}

CUtensorMapSwizzle swizzle_of(Swizzle swizzle) {
  switch (swizzle) {
    case Swizzle::k128:
      return CU_TENSOR_MAP_SWIZZLE_128B;
    case Swizzle::k64:
      return CU_TENSOR_MAP_SWIZZLE_64B;
    case Swizzle::k32:
      return CU_TENSOR_MAP_SWIZZLE_32B;
    default:
      return CU_TENSOR_MAP_SWIZZLE_NONE;
  }
}

}  // namespace

TensorMap encode_tensor_map(const TensorLayout& layout) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap) && sizeof(uint32_t) == sizeof(cuuint32_t));
  CUtensorMap map;  // as the toolkit aligns it
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  cuuint64_t size[5], strides[4];
  for (int axis = 0; axis < 5; ++axis) size[axis] = layout.size[axis];
  for (int axis = 0; axis < 4; ++axis) strides[axis] = layout.stride_bytes[axis];
  const CUresult status =
      encoder()(&map, type_of(layout.element), static_cast<cuuint32_t>(layout.rank), const_cast<void*>(layout.data),
                size, strides, layout.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(layout.swizzle),
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    std::string sizes;
    for (int axis = 0; axis < layout.rank; ++axis) sizes += (axis ? ", " : "") + std::to_string(layout.size[axis]);
    throw std::invalid_argument("fastattn: cuTensorMapEncodeTiled returned " + std::to_string(status) +
                                " for a tensor of sizes (innermost first) " + sizes);
  }
  return std::bit_cast<TensorMap>(map);
}

}  // namespace fastattn::cuda
