// Written by generate_instances.py.
// clang-format off
#include "../attention/forward.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(forward_bf16_d256, ForwardParams, (attention_forward<ForwardConfig<BFloat16, 256>>), forward_tiles(256).threads(), forward_tiles(256).min_blocks)
}  // namespace fastattn::cuda
