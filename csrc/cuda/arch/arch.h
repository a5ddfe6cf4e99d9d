// Everything a kernel may ask of the chip.  Kernels include this and no CUDA header.
#pragma once

#include "config.h"
#include "types.h"
#include "thread.h"
#include "warp.h"
#include "barrier.h"
#include "memory.h"
#include "async_copy.h"
#include "matrix.h"
#include "math.h"
#include "kernel.h"
