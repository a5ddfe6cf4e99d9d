// Written by generate_instances.py.
// clang-format off
#include "../attention/backward_q.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(backward_q_f16_d256, BackwardParams, (attention_backward_q<BackwardQConfig<Half, 256>>), backward_q_tiles(256).threads(), 1)
}  // namespace fastattn::cuda
