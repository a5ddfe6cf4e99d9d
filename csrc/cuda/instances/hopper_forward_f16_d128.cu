// Written by generate_instances.py.
// clang-format off
#include "../hopper/forward.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(hopper_forward_f16_d128, HopperForwardParams, (hopper_attention_forward<HopperForwardConfig<Half, 128, false>>), hopper_forward_tiles(128, false).threads(), 1)
}  // namespace fastattn::cuda
