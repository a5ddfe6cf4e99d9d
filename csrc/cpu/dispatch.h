// Which instruction set runs: the best one this machine has, or the one FASTATTN_CPU_ISA names.
#pragma once

#include <string>

#include "kernels.h"

namespace fastattn::cpu {

// Chosen once per process.  Throws std::runtime_error when FASTATTN_CPU_ISA names a set that is unknown, not
// compiled in or not supported here.
const Kernels& kernels();

// {"isa": ..., "compiled": [...], "supported": [...]} as JSON.
std::string describe();

}  // namespace fastattn::cpu
