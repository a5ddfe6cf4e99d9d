// Written by generate_instances.py.
// clang-format off
#include "../attention/parameter_gradient.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(parameter_gradient_bf16, ParameterParams, (attention_parameter_gradient<ParameterConfig<BFloat16>>), ParameterTiles::kThreads, 2)
}  // namespace fastattn::cuda
