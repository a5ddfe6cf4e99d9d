// Written by generate_instances.py.
// clang-format off
#include "../hopper/backward_kv.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(hopper_backward_kv_plain_bf16_d192, HopperBackwardParams, (hopper_attention_backward_kv<HopperBackwardKvConfig<BFloat16, 192, true>>), HopperBackwardKvTiles::kThreads, 1)
}  // namespace fastattn::cuda
