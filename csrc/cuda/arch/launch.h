// How host code starts a kernel; needs no CUDA header.
#pragma once

namespace fastattn::cuda {

struct Launch {
  int grid_x;
  int grid_y = 1;
  int grid_z = 1;
  int shared_bytes = 0;    // dynamic shared memory of a block
  void* stream = nullptr;  // a cudaStream_t; null is the default stream
};

}  // namespace fastattn::cuda
