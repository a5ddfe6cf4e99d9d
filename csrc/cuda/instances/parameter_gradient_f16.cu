// Written by generate_instances.py.
// clang-format off
#include "../attention/parameter_gradient.h"

namespace fastattn::cuda {
FASTATTN_KERNEL(parameter_gradient_f16, ParameterParams, (attention_parameter_gradient<ParameterConfig<Half>>), ParameterTiles::kThreads, 2)
}  // namespace fastattn::cuda
