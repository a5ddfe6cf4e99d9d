// Written by generate_instances.py.
// clang-format off
#include "../attention/sums.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(attention_sum, SumParams, (attention_sum), SumTiles::kThreads, 4)
}  // namespace fastattn::cuda
