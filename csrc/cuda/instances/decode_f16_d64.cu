// Written by generate_instances.py.
// clang-format off
#include "../attention/decode.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(decode_f16_d64, DecodeParams, (attention_decode<DecodeConfig<Half, 64>>), decode_tiles(64).threads(), 1)
}  // namespace fastattn::cuda
