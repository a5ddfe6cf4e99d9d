// Written by generate_instances.py.
// clang-format off
#include "../attention/backward_q.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(backward_q_bf16_d192, BackwardParams, (attention_backward_q<BackwardQConfig<BFloat16, 192>>), backward_q_tiles(192).threads(), 1)
}  // namespace fastattn::cuda
