// Attention on a GPU, from plain descriptions.  Every pointer is one of the device; nothing here waits for it.
//
// float16 and bfloat16; head dimensions are multiples of 8 up to 256.  Query, key, value, outputs and their gradients
// have a dense last dimension, and rows that start at multiples of 16 bytes.  Throws std::runtime_error, naming what is
// wrong, where that does not hold or a kernel cannot be launched.
#pragma once

#include <string>

#include "../../common/problem.h"
#include "../workspace.h"

namespace fastattn::cuda {

void attention_forward(const Problem& problem, const ForwardOutput& output, Workspace& workspace, const Device& device);
void attention_backward(const Problem& problem, const BackwardInput& input, const BackwardOutput& output,
                        Workspace& workspace, const Device& device);

// What one kernel of a call would run with, for `explain`: tiles, stages, splits, shared memory.
struct Plan {
  const char* kernel = "forward";
  int dim = 0;             // that the kernel computes with
  int rows = 0, keys = 0;  // of a tile
  int threads = 0, shared_bytes = 0, stages = 0, splits = 1;
  int packed_heads = 0;             // that share a tile of queries, where they may
  int registers = 0, waves = 0;     // of a thread that computes, and of blocks; zero where the compiler sees to it
  const char* against_hopper = "";  // on a device of capability 9.0: why not the kernels of sm_90a
};
Plan attention_plan(const Problem& problem, const Device& device);
Plan attention_backward_q_plan(const Problem& problem, const Device& device);
Plan attention_backward_kv_plan(const Problem& problem, const Device& device);

// All of them as a JSON object: the forward's entries, and objects "backward_q" and "backward_kv".
std::string plan_json(const Problem& problem, const Device& device);
// The same of 8-bit operands, which have one kernel (hopper_e4m3_forward).
std::string e4m3_plan_json(const Problem& problem, const Device& device);

}  // namespace fastattn::cuda
