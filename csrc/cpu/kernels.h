// What one instruction set offers; kernels.cpp is compiled once per set and defines one of these.
#pragma once

#include "../common/problem.h"
#include "../common/rows.h"

namespace fastattn::cpu {

// How the forward would cut a problem up, for those who ask.
struct ForwardPlan {
  i64 query_rows, heads, keys, items, scratch_bytes;  // per work item: query rows of so many heads, keys per tile
};

struct Kernels {
  const char* isa;
  void (*forward)(const Problem&, const ForwardOutput&, const Parallel&);
  ForwardPlan (*plan)(const Problem&, i64 threads);
  void (*backward)(const Problem&, const BackwardInput&, const BackwardOutput&, const Parallel&);
  void (*softmax_forward)(const Problem&, const SoftmaxForward&, const Parallel&);
  void (*softmax_backward)(const Problem&, const SoftmaxBackward&, const Parallel&);
  void (*rotate)(const Rotation&, const Parallel&);
  // weight and its gradient: (B|1, Hq, D)
  void (*additive_forward)(const Problem&, const View& weight, const ForwardOutput&, const Parallel&);
  void (*additive_backward)(const Problem&, const View& weight, const BackwardInput&, const BackwardOutput&,
                            const View& dweight, const Parallel&);
};

}  // namespace fastattn::cpu
