#include "../instruction_tests/run.h"

#include <string>
#include <vector>

#include "module.h"
#include "tensors.h"

namespace py = pybind11;

FASTATTN_BIND(instruction_tests) {
  module.def(
      "simulate_instruction_test",
      [](const std::string& name, const py::dict& tensors, std::vector<int> n, std::vector<int> grid,
         int shared_bytes) {
        fastattn::cuda::native::Tensors registered;
        fastattn::cuda::instruction_tests::Params params{};
        n.resize(4), grid.resize(3, 1);
        for (int i = 0; i < 4; ++i) {
          const std::string in = "in" + std::to_string(i), out = "out" + std::to_string(i);
          if (tensors.contains(in)) params.in[i] = registered.address(in.c_str(), tensors[in.c_str()], false);
          if (tensors.contains(out)) params.out[i] = registered.address(out.c_str(), tensors[out.c_str()], true);
          params.n[i] = n[static_cast<size_t>(i)];
        }
        fastattn::cuda::instruction_tests::run(
            name, {.grid_x = grid[0], .grid_y = grid[1], .grid_z = grid[2], .shared_bytes = shared_bytes}, params);
      },
      py::arg("name"), py::arg("tensors"), py::arg("n") = std::vector<int>{}, py::arg("grid") = std::vector<int>{1},
      py::arg("shared_bytes") = 0,
      "Runs the instruction test `name` of csrc/cuda/instruction_tests on CPU tensors named in0 to in3 and out0 to "
      "out3; "
      "only the latter may be written.");
}
