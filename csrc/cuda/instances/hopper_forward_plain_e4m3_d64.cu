// Written by generate_instances.py.
// clang-format off
#include "../hopper/forward.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(hopper_forward_plain_e4m3_d64, HopperForwardParams, (hopper_attention_forward<HopperForwardConfig<E4M3, 64, true>>), hopper_e4m3_tiles(64, true).threads(), 1)
}  // namespace fastattn::cuda
