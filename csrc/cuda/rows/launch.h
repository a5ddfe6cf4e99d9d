// Rotation and masked softmax on a GPU, from plain descriptions.  Every pointer is one of the device; nothing here
// waits for it.  Throws std::runtime_error where a kernel cannot be launched, with the reason.
#pragma once

#include "../../common/rows.h"
#include "../workspace.h"

namespace fastattn::cuda {

// Queries or keys with tables of their own.  Token i takes row positions[b, i] of the tables or, without those, row
// i + offsets[b], or row i + offset.
struct RotationSide {
  View from, to;   // (B, H, S, D), dense last dimension; `to` may be `from`; no heads: nothing to rotate
  View cos, sin;   // (B|1, P, R/2) of float32
  View positions;  // (B|1, S) or null
  View offsets;    // (B|1,) or null
  i64 offset = 0;
};

// Both in one launch.  Element types, batch and D are the same for both.
void rotate(const RotationSide& query, const RotationSide& key, bool interleaved, bool conjugate, const Device& device);
void rotate(const Rotation& rotation, const Device& device);

// Scale, masks and biases come as a Problem whose query, key and value have no width.
void softmax_forward(const Problem& problem, const SoftmaxForward& views, const Device& device);
void softmax_backward(const Problem& problem, const SoftmaxBackward& views, Workspace& workspace, const Device& device);

}  // namespace fastattn::cuda
