// Torch tensors as plain views, without a header of torch: read through their Python attributes.
#pragma once

#include <pybind11/pybind11.h>

#include <vector>

#include "../../common/problem.h"

namespace fastattn::cuda::native {

// The tensors of one call.  Their memory, from the first to the last element and no more, is what kernels may touch in
// the simulator while this object lives.
class Tensors {
 public:
  Tensors() = default;
  Tensors(const Tensors&) = delete;
  Tensors& operator=(const Tensors&) = delete;
  ~Tensors();

  // None is a null view; a dimension of size one has stride zero.  Throws TypeError for what is no CPU tensor of a
  // dtype that kernels know, and of at most four dimensions.
  View read(const char* name, pybind11::handle tensor) { return view(name, tensor, false); }
  View write(const char* name, pybind11::handle tensor) { return view(name, tensor, true); }

  // Registers a tensor of any dtype and shape and returns its address.
  void* address(const char* name, pybind11::handle tensor, bool writable);

 private:
  View view(const char* name, pybind11::handle tensor, bool writable);

  std::vector<const void*> registered_;
};

// A fastattn.problem.Problem.
Problem read_problem(Tensors& tensors, pybind11::handle problem);

}  // namespace fastattn::cuda::native
