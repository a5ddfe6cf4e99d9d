// What the launchers of the forward and the backward share: checked operands, rotated where the problem asks for it.
#pragma once

#include "../features/checks.h"
#include "../features/features.h"
#include "../workspace.h"
#include "params.h"
#include "tiles.h"

namespace fastattn::cuda {

// The place of a dimension in kHeadDims: the smallest that holds it.
int dim_index(i64 dim);

// Checks what the kernels' 16-byte accesses need; throws naming `name`.
Operand operand_of(const char* name, const View& view);
Result result_of(const char* name, const View& view);

// Operands and features of a problem.  Rotates query and key into the workspace first, if they rotate: inside the loop
// over keys, every tile of queries would do it again.
Attention attention_of(const Problem& problem, Workspace& workspace, const Device& device);

// What blocks of queries (of keys) see by ids and masks, where there are any, and enough rows that it is worth the
// look.
Spans key_spans_of(const Problem& problem, const Attention& attention, Workspace& workspace, const Device& device);
Spans query_spans_of(const Problem& problem, const Attention& attention, Workspace& workspace, const Device& device);

// Turns the gradients of the rotated query and key into those of query and key, in place.
void rotate_back(const Problem& problem, const View& dquery, const View& dkey, const Device& device);

// 0 for float16, 1 for bfloat16: the first index of the tables of instances.
int type_index(const Problem& problem);

// Whether `min_blocks` blocks of this size still fit a multiprocessor, which keeps 1 KB per block for itself.
inline bool fits(const Device& device, int bytes, int min_blocks) {
  const int whole = device.shared_memory_per_block + 1024;
  return bytes <= device.shared_memory_per_block && min_blocks * (bytes + 1024) <= whole;
}

}  // namespace fastattn::cuda
