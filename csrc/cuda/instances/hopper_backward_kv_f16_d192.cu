// Written by generate_instances.py.
// clang-format off
#include "../hopper/backward_kv.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(hopper_backward_kv_f16_d192, HopperBackwardParams, (hopper_attention_backward_kv<HopperBackwardKvConfig<Half, 192, false>>), HopperBackwardKvTiles::kThreads, 1)
}  // namespace fastattn::cuda
