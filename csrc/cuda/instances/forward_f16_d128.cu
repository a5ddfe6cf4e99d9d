// Written by generate_instances.py.
// clang-format off
#include "../attention/forward.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(forward_f16_d128, ForwardParams, (attention_forward<ForwardConfig<Half, 128>>), forward_tiles(128).threads(), forward_tiles(128).min_blocks)
}  // namespace fastattn::cuda
