// Masks, biases and numbers of a Problem in the form the kernels take.
#pragma once

#include "../../common/problem.h"
#include "params.h"

namespace fastattn::cuda {

// Everything of `Attention` but its operands.  Throws std::runtime_error for what no kernel can address.
Attention features_of(const Problem& problem);

}  // namespace fastattn::cuda
