// Written by generate_instances.py.
// clang-format off
#include "../rows/line_sum.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(line_sum_f16, LineSumParams, (line_sum<Half>), kLineThreads, 4)
}  // namespace fastattn::cuda
