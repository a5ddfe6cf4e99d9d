// Written by generate_instances.py.
// clang-format off
#include "../attention/forward.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(forward_f16_d96, ForwardParams, (attention_forward<ForwardConfig<Half, 96>>), forward_tiles(96).threads(), forward_tiles(96).min_blocks)
}  // namespace fastattn::cuda
