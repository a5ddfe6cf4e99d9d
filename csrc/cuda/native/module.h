// fastattn._native: kernels in the simulator, driven from Python.  A developer's module: it is in no wheel.
//
// A file of this folder binds launchers like this, and nothing else needs to know of it:
//     FASTATTN_BIND(rows) { module.def("rotate", ...); }
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

namespace fastattn::cuda::native {

struct Binding {
  explicit Binding(void (*bind)(pybind11::module_&));
};

#define FASTATTN_BIND(name)                                                                     \
  static void fastattn_bind_##name(pybind11::module_& module);                                  \
  static const ::fastattn::cuda::native::Binding fastattn_binding_##name(fastattn_bind_##name); \
  static void fastattn_bind_##name([[maybe_unused]] pybind11::module_& module)

}  // namespace fastattn::cuda::native
