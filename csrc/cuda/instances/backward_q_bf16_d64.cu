// Written by generate_instances.py.
// clang-format off
#include "../attention/backward_q.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(backward_q_bf16_d64, BackwardParams, (attention_backward_q<BackwardQConfig<BFloat16, 64>>), backward_q_tiles(64).threads(), 1)
}  // namespace fastattn::cuda
