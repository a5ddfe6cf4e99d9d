// Written by generate_instances.py.
// clang-format off
#include "../hopper/forward.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(hopper_forward_bf16_d192, HopperForwardParams, (hopper_attention_forward<HopperForwardConfig<BFloat16, 192, false>>), hopper_forward_tiles(192, false).threads(), 1)
}  // namespace fastattn::cuda
