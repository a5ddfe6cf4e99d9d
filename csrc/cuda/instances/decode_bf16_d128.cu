// Written by generate_instances.py.
// clang-format off
#include "../attention/decode.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(decode_bf16_d128, DecodeParams, (attention_decode<DecodeConfig<BFloat16, 128>>), decode_tiles(128).threads(), 1)
}  // namespace fastattn::cuda
