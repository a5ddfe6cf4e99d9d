// What the launchers of the sm_90a forward and backward share.
#pragma once

#include <string_view>

#include "../attention/call.h"
#include "params.h"
#include "tiles.h"

namespace fastattn::cuda {

// What FASTATTN_CUDA_HOPPER says, "0" where it is not set.
std::string_view hopper_asked();

// The instances of a kernel, in the order of kHopperDims.
#define FASTATTN_BY_DIM(kernel) {kernel##_d64, kernel##_d96, kernel##_d128, kernel##_d192, kernel##_d256}

// The place of a problem's dimension in kHopperDims: the smallest that holds it.
int hopper_dim_index(const Problem& problem);
int hopper_e4m3_dim_index(const Problem& problem);  // in kHopperE4M3Dims

// Intervals of keys are all there is.
bool is_plain(const Attention& attention);

// A tensor (B, H, S, D) as the copies see it, `rows` rows of a panel of a tile of `dim` columns at a time.  A dimension
// that is broadcast has one element.
MappedOperand map_of(const Problem& problem, const Operand& x, i64 heads, i64 length, i64 columns, int dim, int rows);
MappedOperand map_of(const Problem& problem, const Result& x, i64 heads, i64 length, i64 columns, int dim, int rows);

// The same with heads before rows, for rows that are packed: a box takes a group's queries of a pack's heads.
MappedOperand packed_map_of(const Problem& problem, const Operand& x, i64 columns, int dim, const Packing& packing);
MappedOperand packed_map_of(const Problem& problem, const Result& x, DType dtype, i64 columns, int dim,
                            const Packing& packing);

// Tiles of `rows` rows of `length`, of each of `heads` heads.  A section holds as many heads as have what they all read
// in L2: `bytes` for every `group` of them.
Schedule schedule_of(const Problem& problem, i64 length, int rows, i64 heads, i64 group, i64 bytes);

}  // namespace fastattn::cuda
