// Written by generate_instances.py.
// clang-format off
#include "../hopper/forward.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(hopper_forward_e4m3_d128, HopperForwardParams, (hopper_attention_forward<HopperForwardConfig<E4M3, 128, false>>), hopper_e4m3_tiles(128, false).threads(), 1)
}  // namespace fastattn::cuda
