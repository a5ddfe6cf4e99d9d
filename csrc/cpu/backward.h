#pragma once
#include "scores.h"
namespace fastattn::cpu::FASTATTN_ISA {
template <class Mode>
inline void backward(const Problem&, const BackwardInput&, const BackwardOutput&, const Parallel&) {}
}
