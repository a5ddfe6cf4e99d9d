// Kernels for sm_90a with one bug each, which the simulator must find.  They are never compiled for a GPU.
#pragma once

#include "hopper_kernels.h"

namespace fastattn::cuda::instruction_tests {

#define FASTATTN_HOPPER_PLANTED_BUGS(X)

}  // namespace fastattn::cuda::instruction_tests
