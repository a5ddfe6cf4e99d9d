// Whether a call takes the sm_90a kernels, and its launch.
#pragma once

#include "../attention/launch.h"

namespace fastattn::cuda {

// Null where the sm_90a forward runs this call, else why it does not.  It has not been timed yet and runs only when the
// environment asks: FASTATTN_CUDA_HOPPER=1, or =unpinned for the variant without held exponentials, where there is one.
const char* reason_against_hopper(const Problem& problem, const Device& device);

Plan hopper_forward_plan(const Problem& problem, const Device& device);
void hopper_forward(const Problem& problem, const ForwardOutput& output, Workspace& workspace, const Device& device);

}  // namespace fastattn::cuda
