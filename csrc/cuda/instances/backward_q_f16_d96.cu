// Written by generate_instances.py.
// clang-format off
#include "../attention/backward_q.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(backward_q_f16_d96, BackwardParams, (attention_backward_q<BackwardQConfig<Half, 96>>), backward_q_tiles(96).threads(), 1)
}  // namespace fastattn::cuda
