// Written by generate_instances.py.
// clang-format off
#include "../attention/sums.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(attention_sum_diagonals, SumDiagonalsParams, (attention_sum_diagonals), SumTiles::kThreads, 4)
}  // namespace fastattn::cuda
