// Written by generate_instances.py.
// clang-format off
#include "../hopper/forward.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(hopper_forward_unpinned_bf16_d256, HopperForwardParams, (hopper_attention_forward<HopperForwardConfig<BFloat16, 256, true, false>>), hopper_forward_tiles(256, true).threads(), 1)
}  // namespace fastattn::cuda
