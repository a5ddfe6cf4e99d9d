// Written by generate_instances.py.
// clang-format off
#include "../attention/backward_q.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(backward_q_bf16_d128, BackwardParams, (attention_backward_q<BackwardQConfig<BFloat16, 128>>), backward_q_tiles(128).threads(), 1)
}  // namespace fastattn::cuda
