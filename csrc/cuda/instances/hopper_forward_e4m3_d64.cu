// Written by generate_instances.py.
// clang-format off
#include "../hopper/forward.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(hopper_forward_e4m3_d64, HopperForwardParams, (hopper_attention_forward<HopperForwardConfig<E4M3, 64, false>>), hopper_e4m3_tiles(64, false).threads(), 1)
}  // namespace fastattn::cuda
