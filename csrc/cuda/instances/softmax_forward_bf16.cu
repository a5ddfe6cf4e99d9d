// Written by generate_instances.py.
// clang-format off
#include "../rows/softmax_forward.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(softmax_forward_bf16, SoftmaxParams, (softmax_forward<BFloat16>), kRowThreads, 2)
}  // namespace fastattn::cuda
