// Written by generate_instances.py.
// clang-format off
#include "../hopper/forward.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(hopper_forward_f16_d96, HopperForwardParams, (hopper_attention_forward<HopperForwardConfig<Half, 96, false>>), hopper_forward_tiles(96, false).threads(), 1)
}  // namespace fastattn::cuda
