// Written by generate_instances.py.
// clang-format off
#include "../hopper/backward_q.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(hopper_backward_q_plain_f16_d192, HopperBackwardParams, (hopper_attention_backward_q<HopperBackwardQConfig<Half, 192, true>>), HopperBackwardQTiles::kThreads, 1)
}  // namespace fastattn::cuda
