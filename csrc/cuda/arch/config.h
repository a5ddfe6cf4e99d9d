// What every header of this folder begins with: one source for two compilers.
//
// Under nvcc a function's body is the PTX instruction; under a host compiler it calls the simulator (../sim), which
// does what the PTX manual says.  On the host, functions that can fail take the caller's source location as a hidden
// last argument, so that an error names the line in the kernel.
#pragma once

#include <cstdint>

#ifdef __CUDACC__

#define FASTATTN_DEVICE __device__ __forceinline__
#define FASTATTN_HOST_DEVICE __host__ __device__ __forceinline__
#define FASTATTN_UNROLL _Pragma("unroll")
#define FASTATTN_NO_UNROLL _Pragma("unroll 1")
#define FASTATTN_WHERE
#define FASTATTN_WHERE_ONLY
#define FASTATTN_HERE

#else

#include <source_location>

#define FASTATTN_DEVICE inline
#define FASTATTN_HOST_DEVICE inline
#define FASTATTN_UNROLL
#define FASTATTN_NO_UNROLL
// The last parameter of a function with others, and of one without; FASTATTN_HERE hands it on, as the last argument.
#define FASTATTN_WHERE , std::source_location where = std::source_location::current()
#define FASTATTN_WHERE_ONLY std::source_location where = std::source_location::current()
#define FASTATTN_HERE , where

#include "../sim/instructions.h"

#endif
