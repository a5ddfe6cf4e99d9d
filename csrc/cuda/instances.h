// Written by generate_instances.py: the launch function of every kernel instance.
#pragma once

#include "arch/launch.h"
#include "rows/params.h"

namespace fastattn::cuda {

void rotary_f16(const Launch&, const RotaryParams&);
void rotary_bf16(const Launch&, const RotaryParams&);
void rotary_f32(const Launch&, const RotaryParams&);
void softmax_forward_f16(const Launch&, const SoftmaxParams&);
void softmax_forward_bf16(const Launch&, const SoftmaxParams&);
void softmax_forward_f32(const Launch&, const SoftmaxParams&);
void softmax_backward_f16(const Launch&, const SoftmaxGradientParams&);
void softmax_backward_bf16(const Launch&, const SoftmaxGradientParams&);
void softmax_backward_f32(const Launch&, const SoftmaxGradientParams&);
void line_sum_f16(const Launch&, const LineSumParams&);
void line_sum_f32(const Launch&, const LineSumParams&);
void part_sum(const Launch&, const PartSumParams&);

}  // namespace fastattn::cuda
