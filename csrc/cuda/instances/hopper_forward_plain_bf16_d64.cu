// Written by generate_instances.py.
// clang-format off
#include "../hopper/forward.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(hopper_forward_plain_bf16_d64, HopperForwardParams, (hopper_attention_forward<HopperForwardConfig<BFloat16, 64, true>>), hopper_forward_tiles(64, true).threads(), 1)
}  // namespace fastattn::cuda
