// Written by generate_instances.py.
// clang-format off
#include "../attention/backward_q.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(backward_q_f16_d32, BackwardParams, (attention_backward_q<BackwardQConfig<Half, 32>>), backward_q_tiles(32).threads(), 1)
}  // namespace fastattn::cuda
