// Written by generate_instances.py.
// clang-format off
#include "../hopper/forward.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(hopper_forward_plain_f16_d256, HopperForwardParams, (hopper_attention_forward<HopperForwardConfig<Half, 256, true>>), hopper_forward_tiles(256, true).threads(), 1)
}  // namespace fastattn::cuda
