// Written by generate_instances.py.
// clang-format off
#include "../attention/backward_kv.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(backward_kv_f16_d32, BackwardParams, (attention_backward_kv<BackwardKvConfig<Half, 32>>), backward_kv_tiles(32).threads(), 1)
}  // namespace fastattn::cuda
