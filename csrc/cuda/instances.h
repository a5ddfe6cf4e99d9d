// Written by generate_instances.py: the launch function of every kernel instance.
#pragma once

#include "arch/launch.h"
#include "attention/params.h"
#include "hopper/params.h"
#include "rows/params.h"

namespace fastattn::cuda {

void forward_f16_d32(const Launch&, const ForwardParams&);
void forward_f16_d64(const Launch&, const ForwardParams&);
void forward_f16_d96(const Launch&, const ForwardParams&);
void forward_f16_d128(const Launch&, const ForwardParams&);
void forward_f16_d192(const Launch&, const ForwardParams&);
void forward_f16_d256(const Launch&, const ForwardParams&);
void forward_bf16_d32(const Launch&, const ForwardParams&);
void forward_bf16_d64(const Launch&, const ForwardParams&);
void forward_bf16_d96(const Launch&, const ForwardParams&);
void forward_bf16_d128(const Launch&, const ForwardParams&);
void forward_bf16_d192(const Launch&, const ForwardParams&);
void forward_bf16_d256(const Launch&, const ForwardParams&);
void backward_kv_f16_d32(const Launch&, const BackwardParams&);
void backward_kv_f16_d64(const Launch&, const BackwardParams&);
void backward_kv_f16_d96(const Launch&, const BackwardParams&);
void backward_kv_f16_d128(const Launch&, const BackwardParams&);
void backward_kv_f16_d192(const Launch&, const BackwardParams&);
void backward_kv_f16_d256(const Launch&, const BackwardParams&);
void backward_kv_bf16_d32(const Launch&, const BackwardParams&);
void backward_kv_bf16_d64(const Launch&, const BackwardParams&);
void backward_kv_bf16_d96(const Launch&, const BackwardParams&);
void backward_kv_bf16_d128(const Launch&, const BackwardParams&);
void backward_kv_bf16_d192(const Launch&, const BackwardParams&);
void backward_kv_bf16_d256(const Launch&, const BackwardParams&);
void backward_q_f16_d32(const Launch&, const BackwardParams&);
void backward_q_f16_d64(const Launch&, const BackwardParams&);
void backward_q_f16_d96(const Launch&, const BackwardParams&);
void backward_q_f16_d128(const Launch&, const BackwardParams&);
void backward_q_f16_d192(const Launch&, const BackwardParams&);
void backward_q_f16_d256(const Launch&, const BackwardParams&);
void backward_q_bf16_d32(const Launch&, const BackwardParams&);
void backward_q_bf16_d64(const Launch&, const BackwardParams&);
void backward_q_bf16_d96(const Launch&, const BackwardParams&);
void backward_q_bf16_d128(const Launch&, const BackwardParams&);
void backward_q_bf16_d192(const Launch&, const BackwardParams&);
void backward_q_bf16_d256(const Launch&, const BackwardParams&);
void decode_f16_d64(const Launch&, const DecodeParams&);
void decode_f16_d128(const Launch&, const DecodeParams&);
void decode_f16_d256(const Launch&, const DecodeParams&);
void decode_bf16_d64(const Launch&, const DecodeParams&);
void decode_bf16_d128(const Launch&, const DecodeParams&);
void decode_bf16_d256(const Launch&, const DecodeParams&);
void parameter_gradient_f16(const Launch&, const ParameterParams&);
void parameter_gradient_bf16(const Launch&, const ParameterParams&);
void attention_delta(const Launch&, const DeltaParams&);
void attention_combine(const Launch&, const CombineParams&);
void attention_sum_partials(const Launch&, const SumPartialsParams&);
void attention_sum_diagonals(const Launch&, const SumDiagonalsParams&);
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
void hopper_forward_f16_d64(const Launch&, const HopperForwardParams&);
void hopper_forward_f16_d96(const Launch&, const HopperForwardParams&);
void hopper_forward_f16_d128(const Launch&, const HopperForwardParams&);
void hopper_forward_f16_d192(const Launch&, const HopperForwardParams&);
void hopper_forward_f16_d256(const Launch&, const HopperForwardParams&);
void hopper_forward_bf16_d64(const Launch&, const HopperForwardParams&);
void hopper_forward_bf16_d96(const Launch&, const HopperForwardParams&);
void hopper_forward_bf16_d128(const Launch&, const HopperForwardParams&);
void hopper_forward_bf16_d192(const Launch&, const HopperForwardParams&);
void hopper_forward_bf16_d256(const Launch&, const HopperForwardParams&);
void hopper_forward_plain_f16_d64(const Launch&, const HopperForwardParams&);
void hopper_forward_plain_f16_d96(const Launch&, const HopperForwardParams&);
void hopper_forward_plain_f16_d128(const Launch&, const HopperForwardParams&);
void hopper_forward_plain_f16_d192(const Launch&, const HopperForwardParams&);
void hopper_forward_plain_f16_d256(const Launch&, const HopperForwardParams&);
void hopper_forward_plain_bf16_d64(const Launch&, const HopperForwardParams&);
void hopper_forward_plain_bf16_d96(const Launch&, const HopperForwardParams&);
void hopper_forward_plain_bf16_d128(const Launch&, const HopperForwardParams&);
void hopper_forward_plain_bf16_d192(const Launch&, const HopperForwardParams&);
void hopper_forward_plain_bf16_d256(const Launch&, const HopperForwardParams&);
void hopper_forward_unpinned_bf16_d64(const Launch&, const HopperForwardParams&);
void hopper_forward_unpinned_bf16_d128(const Launch&, const HopperForwardParams&);
void hopper_forward_unpinned_bf16_d256(const Launch&, const HopperForwardParams&);
void hopper_backward_q_f16_d64(const Launch&, const HopperBackwardParams&);
void hopper_backward_q_f16_d96(const Launch&, const HopperBackwardParams&);
void hopper_backward_q_f16_d128(const Launch&, const HopperBackwardParams&);
void hopper_backward_q_bf16_d64(const Launch&, const HopperBackwardParams&);
void hopper_backward_q_bf16_d96(const Launch&, const HopperBackwardParams&);
void hopper_backward_q_bf16_d128(const Launch&, const HopperBackwardParams&);
void hopper_backward_q_plain_f16_d64(const Launch&, const HopperBackwardParams&);
void hopper_backward_q_plain_f16_d96(const Launch&, const HopperBackwardParams&);
void hopper_backward_q_plain_f16_d128(const Launch&, const HopperBackwardParams&);
void hopper_backward_q_plain_bf16_d64(const Launch&, const HopperBackwardParams&);
void hopper_backward_q_plain_bf16_d96(const Launch&, const HopperBackwardParams&);
void hopper_backward_q_plain_bf16_d128(const Launch&, const HopperBackwardParams&);
void hopper_backward_kv_f16_d64(const Launch&, const HopperBackwardParams&);
void hopper_backward_kv_f16_d96(const Launch&, const HopperBackwardParams&);
void hopper_backward_kv_f16_d128(const Launch&, const HopperBackwardParams&);
void hopper_backward_kv_bf16_d64(const Launch&, const HopperBackwardParams&);
void hopper_backward_kv_bf16_d96(const Launch&, const HopperBackwardParams&);
void hopper_backward_kv_bf16_d128(const Launch&, const HopperBackwardParams&);
void hopper_backward_kv_plain_f16_d64(const Launch&, const HopperBackwardParams&);
void hopper_backward_kv_plain_f16_d96(const Launch&, const HopperBackwardParams&);
void hopper_backward_kv_plain_f16_d128(const Launch&, const HopperBackwardParams&);
void hopper_backward_kv_plain_bf16_d64(const Launch&, const HopperBackwardParams&);
void hopper_backward_kv_plain_bf16_d96(const Launch&, const HopperBackwardParams&);
void hopper_backward_kv_plain_bf16_d128(const Launch&, const HopperBackwardParams&);

}  // namespace fastattn::cuda
