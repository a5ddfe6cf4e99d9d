// Written by generate_instances.py.
// clang-format off
#include "../rows/softmax_backward.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(softmax_backward_f32, SoftmaxGradientParams, (softmax_backward<float>), kRowThreads, 3)
}  // namespace fastattn::cuda
