// Written by generate_instances.py.
// clang-format off
#include "../rows/rotary.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(rotary_bf16, RotaryParams, (rotary<BFloat16>), kRotaryThreads, 2)
}  // namespace fastattn::cuda
