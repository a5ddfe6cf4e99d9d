// Written by generate_instances.py.
// clang-format off
#include "../attention/delta.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(attention_delta, DeltaParams, (attention_delta), DeltaTiles::kThreads, 8)
}  // namespace fastattn::cuda
