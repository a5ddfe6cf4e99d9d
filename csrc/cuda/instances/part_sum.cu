// Written by generate_instances.py.
// clang-format off
#include "../rows/part_sum.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(part_sum, PartSumParams, (part_sum), kRowThreads, 4)
}  // namespace fastattn::cuda
