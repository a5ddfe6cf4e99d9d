// Written by generate_instances.py.
// clang-format off
#include "../attention/decode.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(decode_f16_d256, DecodeParams, (attention_decode<DecodeConfig<Half, 256>>), decode_tiles(256).threads(), 1)
}  // namespace fastattn::cuda
