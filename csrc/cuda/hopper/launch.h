// Whether a call takes the sm_90a kernels, and its launch.
#pragma once

#include "../attention/launch.h"
#include "../attention/params.h"

namespace fastattn::cuda {

// Null where the sm_90a forward runs this call, else why it does not.  It has not been timed yet and runs only when the
// environment asks: FASTATTN_CUDA_HOPPER=1, or =unpinned for the variant without held exponentials, where there is one.
const char* reason_against_hopper(const Problem& problem, const Device& device);

// The same of operands of 8 bits, which have a kernel here and nowhere else: intervals of keys, documents, masks,
// sinks.
const char* reason_against_e4m3(const Problem& problem, const Device& device);

// Writes out, in bfloat16, and lse.  Throws std::runtime_error where there is a reason against it.
void hopper_e4m3_forward(const Problem& problem, const OperandScales& scales, const ForwardOutput& output,
                         Workspace& workspace, const Device& device);
Plan hopper_e4m3_plan(const Problem& problem, const Device& device);

// Whether a call that the kernel for few queries could take is better off here: its rows are packed sixteen at a time,
// and every sixteen read the keys again, while here 64 or more share them.  Keys are not cut into parts here, so there
// must be tiles enough to fill the device.
bool hopper_takes_few_queries(const Problem& problem, const Device& device);

Plan hopper_forward_plan(const Problem& problem, const Device& device);
void hopper_forward(const Problem& problem, const ForwardOutput& output, Workspace& workspace, const Device& device);

// Whether the backward runs as well; `grad_out` as the call gives it.
bool takes_hopper_backward(const Problem& problem, const View& grad_out, const Device& device);

// dQ with slopes and the table's ends, and dK with dV: `params` as the kernels of sm_80 take them, with as many partial
// sums for a head as `hopper_partial_sums` says.
int hopper_partial_sums(const Problem& problem);
void hopper_backward_q(const Problem& problem, const BackwardParams& params, const Device& device);
void hopper_backward_kv(const Problem& problem, const BackwardParams& params, const Device& device);

Plan hopper_backward_q_plan(const Problem& problem, const Device& device);
Plan hopper_backward_kv_plan(const Problem& problem, const Device& device);

}  // namespace fastattn::cuda
