#pragma once

#include <string>

#include "../arch/launch.h"
#include "../arch/tensor_map.h"

namespace fastattn::cuda::instruction_tests {

struct Params {
  const void* in[4];
  void* out[4];
  int n[4];
  TensorMap maps[2];  // of tests for sm_90a
};

// Launches the kernel of this name.  Throws std::invalid_argument where there is none.
void run(const std::string& name, const Launch& launch, const Params& params);
// The same for the tests for sm_90a.  False: there is none of this name.
bool run_on_hopper(const std::string& name, const Launch& launch, const Params& params);

}  // namespace fastattn::cuda::instruction_tests
