// What one instruction set offers; kernels.cpp is compiled once per set and defines one of these.
#pragma once

#include "../common/problem.h"
#include "../common/rows.h"

namespace fastattn::cpu {

// How the forward would cut a problem up, for those who ask.
struct ForwardPlan {
  i64 query_rows, heads, keys, items, scratch_bytes;  // per work item: query rows of so many heads, keys per tile
};

// What one core does at best, in one kind of arithmetic; for the bench.
struct Roofline {
  double peak = 0;                        // FLOP/s of independent multiply-adds
  double scores[2] = {}, values[2] = {};  // FLOP/s of gemm on attention's two products, head dimension 64 and 128
  double weights = 0;                     // maximum and exponential, scores per second
};

struct Kernels {
  const char* isa;
  void (*forward)(const Problem&, const ForwardOutput&, const Parallel&);
  ForwardPlan (*plan)(const Problem&, i64 threads);
  void (*backward)(const Problem&, const BackwardInput&, const BackwardOutput&, const Parallel&);
  void (*weights_forward)(const Problem&, const ForwardOutput&, const WeightsOutput&, const Parallel&);
  void (*softmax_forward)(const Problem&, const SoftmaxForward&, const Parallel&);
  void (*softmax_backward)(const Problem&, const SoftmaxBackward&, const Parallel&);
  void (*rotate)(const Rotation&, const Parallel&);
  // weight and its gradient: (B|1, Hq, D)
  void (*additive_forward)(const Problem&, const View& weight, const ForwardOutput&, const Parallel&);
  void (*additive_backward)(const Problem&, const View& weight, const BackwardInput&, const BackwardOutput&,
                            const View& dweight, const Parallel&);
  Roofline (*roofline)(DType, double seconds);                    // so long per number
  void (*exp2)(const float* in, float* out, i64 n, bool coarse);  // n a multiple of 16; for the test of its error
};

}  // namespace fastattn::cpu
