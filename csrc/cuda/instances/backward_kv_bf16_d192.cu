// Written by generate_instances.py.
// clang-format off
#include "../attention/backward_kv.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(backward_kv_bf16_d192, BackwardParams, (attention_backward_kv<BackwardKvConfig<BFloat16, 192>>), backward_kv_tiles(192).threads(), 1)
}  // namespace fastattn::cuda
