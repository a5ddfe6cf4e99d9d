// Written by generate_instances.py.
// clang-format off
#include "../attention/forward.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(forward_f16_d32, ForwardParams, (attention_forward<ForwardConfig<Half, 32>>), forward_tiles(32).threads(), forward_tiles(32).min_blocks)
}  // namespace fastattn::cuda
