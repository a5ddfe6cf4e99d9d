#pragma once

#include <string>

#include "../arch/launch.h"

namespace fastattn::cuda::instruction_tests {

struct Params {
  const void* in[4];
  void* out[4];
  int n[4];
};

// Launches the kernel of this name.  Throws std::invalid_argument where there is none.
void run(const std::string& name, const Launch& launch, const Params& params);

}  // namespace fastattn::cuda::instruction_tests
