// What a launch needs to know of where it runs, and where it gets memory.
#pragma once

#include <cstddef>

namespace fastattn::cuda {

struct Device {
  void* stream = nullptr;  // a cudaStream_t
  int capability = 80;     // 10 * major + minor
  int shared_memory_per_block = 0;
  int multiprocessors = 1;
};

// Device memory that lives until the launches that use it are done, at multiples of 256 bytes.
struct Workspace {
  virtual ~Workspace() = default;
  virtual void* allocate(size_t bytes) = 0;
};

}  // namespace fastattn::cuda
