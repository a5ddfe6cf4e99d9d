#include "../instruction_tests/run.h"

#include <cstring>
#include <string>
#include <vector>

#include "module.h"
#include "tensors.h"

namespace py = pybind11;

using fastattn::cuda::encode_tensor_map;
using fastattn::cuda::Swizzle;
using fastattn::cuda::TensorElement;
using fastattn::cuda::TensorLayout;
using fastattn::cuda::TensorMap;

FASTATTN_BIND(instruction_tests) {
  module.def(
      "simulate_instruction_test",
      [](const std::string& name, const py::dict& tensors, std::vector<int> n, std::vector<int> grid, int shared_bytes,
         const std::vector<py::bytes>& maps) {
        fastattn::cuda::native::Tensors registered;
        fastattn::cuda::instruction_tests::Params params{};
        n.resize(4), grid.resize(3, 1);
        for (int i = 0; i < 4; ++i) {
          const std::string in = "in" + std::to_string(i), out = "out" + std::to_string(i);
          if (tensors.contains(in)) params.in[i] = registered.address(in.c_str(), tensors[in.c_str()], false);
          if (tensors.contains(out)) params.out[i] = registered.address(out.c_str(), tensors[out.c_str()], true);
          params.n[i] = n[static_cast<size_t>(i)];
        }
        for (size_t i = 0; i < maps.size() && i < std::size(params.maps); ++i) {
          const auto bytes = static_cast<std::string>(maps[i]);
          if (bytes.size() != sizeof(TensorMap)) throw py::value_error("a tensor map has 128 bytes");
          std::memcpy(&params.maps[i], bytes.data(), bytes.size());
        }
        const fastattn::cuda::Launch launch{
            .grid_x = grid[0], .grid_y = grid[1], .grid_z = grid[2], .shared_bytes = shared_bytes};
        if (!fastattn::cuda::instruction_tests::run_on_hopper(name, launch, params)) {
          fastattn::cuda::instruction_tests::run(name, launch, params);
        }
      },
      py::arg("name"), py::arg("tensors"), py::arg("n") = std::vector<int>{}, py::arg("grid") = std::vector<int>{1},
      py::arg("shared_bytes") = 0, py::arg("maps") = std::vector<py::bytes>{},
      "Runs the instruction test `name` of csrc/cuda/instruction_tests on CPU tensors named in0 to in3 and out0 to "
      "out3; only the latter may be written.  `maps` are what encode_tensor_map returned.");
  module.def(
      "encode_tensor_map",
      [](py::handle tensor, std::vector<uint64_t> size, std::vector<uint64_t> stride_bytes, std::vector<uint32_t> box,
         int swizzle) {
        TensorLayout layout;
        layout.data = reinterpret_cast<const void*>(py::cast<uintptr_t>(tensor.attr("data_ptr")()));
        const int bytes = py::cast<int>(tensor.attr("element_size")());
        layout.element = bytes == 4 ? TensorElement::kFloat : bytes == 1 ? TensorElement::kByte : TensorElement::kHalf;
        layout.rank = static_cast<int>(size.size());
        size.resize(5), stride_bytes.resize(4), box.resize(5);
        std::copy(size.begin(), size.end(), layout.size);
        std::copy(stride_bytes.begin(), stride_bytes.end(), layout.stride_bytes);
        std::copy(box.begin(), box.end(), layout.box);
        switch (swizzle) {
          case 0:
            layout.swizzle = Swizzle::kNone;
            break;
          case 32:
            layout.swizzle = Swizzle::k32;
            break;
          case 64:
            layout.swizzle = Swizzle::k64;
            break;
          case 128:
            layout.swizzle = Swizzle::k128;
            break;
          default:
            throw py::value_error("swizzle must be 0, 32, 64 or 128 bytes");
        }
        const TensorMap map = encode_tensor_map(layout);
        return py::bytes(reinterpret_cast<const char*>(&map), sizeof map);
      },
      py::arg("tensor"), py::arg("size"), py::arg("stride_bytes"), py::arg("box"), py::arg("swizzle") = 0,
      "A tensor map of the simulator over the memory of `tensor`, the innermost dimension first; `stride_bytes` begins "
      "with the second.");
}
