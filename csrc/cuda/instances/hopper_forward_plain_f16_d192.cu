// Written by generate_instances.py.
// clang-format off
#include "../hopper/forward.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(hopper_forward_plain_f16_d192, HopperForwardParams, (hopper_attention_forward<HopperForwardConfig<Half, 192, true>>), hopper_forward_tiles(192, true).threads(), 1)
}  // namespace fastattn::cuda
