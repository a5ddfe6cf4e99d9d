// Written by generate_instances.py.
// clang-format off
#include "../attention/forward.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(forward_bf16_d192, ForwardParams, (attention_forward<ForwardConfig<BFloat16, 192>>), forward_tiles(192).threads(), forward_tiles(192).min_blocks)
}  // namespace fastattn::cuda
