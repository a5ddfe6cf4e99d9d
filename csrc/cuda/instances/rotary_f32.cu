// Written by generate_instances.py.
// clang-format off
#include "../rows/rotary.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(rotary_f32, RotaryParams, (rotary<float>), kRotaryThreads, 2)
}  // namespace fastattn::cuda
