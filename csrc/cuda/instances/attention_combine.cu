// Written by generate_instances.py.
// clang-format off
#include "../attention/combine.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(attention_combine, CombineParams, (attention_combine), CombineTiles::kThreads, 4)
}  // namespace fastattn::cuda
