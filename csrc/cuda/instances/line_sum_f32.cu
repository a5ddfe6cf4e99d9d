// Written by generate_instances.py.
// clang-format off
#include "../rows/line_sum.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(line_sum_f32, LineSumParams, (line_sum<float>), kLineThreads, 4)
}  // namespace fastattn::cuda
