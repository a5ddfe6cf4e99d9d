// Written by generate_instances.py.
// clang-format off
#include "../attention/backward_kv.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(backward_kv_bf16_d64, BackwardParams, (attention_backward_kv<BackwardKvConfig<BFloat16, 64>>), backward_kv_tiles(64).threads(), 1)
}  // namespace fastattn::cuda
