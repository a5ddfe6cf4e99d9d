// What one instruction set offers; kernels.cpp is compiled once per set and defines one of these.
#pragma once

#include "../common/problem.h"
#include "../common/rows.h"

namespace fastattn::cpu {

struct Kernels {
  const char* isa;
  void (*forward)(const Problem&, const ForwardOutput&, const Parallel&);
  void (*backward)(const Problem&, const BackwardInput&, const BackwardOutput&, const Parallel&);
  void (*softmax_forward)(const Problem&, const SoftmaxForward&, const Parallel&);
  void (*softmax_backward)(const Problem&, const SoftmaxBackward&, const Parallel&);
  void (*rotate)(const Rotation&, const Parallel&);
};

}  // namespace fastattn::cpu
