// Written by generate_instances.py.
// clang-format off
#include "../attention/forward.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(forward_bf16_d64, ForwardParams, (attention_forward<ForwardConfig<BFloat16, 64>>), forward_tiles(64).threads(), forward_tiles(64).min_blocks)
}  // namespace fastattn::cuda
