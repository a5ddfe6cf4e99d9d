// What the launchers of this folder share.
#pragma once

#include "../features/checks.h"
#include "params.h"

namespace fastattn::cuda {

inline Rows rows_of(const View& view) {
  return {const_cast<void*>(view.data), view.stride[0], view.stride[1], view.stride[2]};
}

}  // namespace fastattn::cuda
