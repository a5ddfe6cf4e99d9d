// Written by generate_instances.py.
// clang-format off
#include "../hopper/forward.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(hopper_forward_plain_f16_d64, HopperForwardParams, (hopper_attention_forward<HopperForwardConfig<Half, 64, true>>), hopper_forward_tiles(64, true).threads(), 1)
}  // namespace fastattn::cuda
