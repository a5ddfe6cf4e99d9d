// Written by generate_instances.py.
// clang-format off
#include "../attention/backward_kv.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(backward_kv_f16_d256, BackwardParams, (attention_backward_kv<BackwardKvConfig<Half, 256>>), backward_kv_tiles(256).threads(), 1)
}  // namespace fastattn::cuda
