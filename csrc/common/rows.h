// The calls beside attention as plain data: the masked softmax and the rotation, twins of fastattn/softmax_problem.py
// and fastattn/rotation.py.
#pragma once

#include "problem.h"

namespace fastattn {

// Scale, masks and biases come as a Problem whose query, key and value have no width.
struct SoftmaxForward {
  View scores, out;  // (B, H, Sq, Sk)
};

// Null views are gradients nobody asked for.  Parameter gradients have the shape of their parameter.
struct SoftmaxBackward {
  View out, grad_out;  // (B, H, Sq, Sk)
  View dscores, dslopes, dtable, ddense_bias;
};

struct Rotation {
  View from[2], to[2];  // query and key (B, H, S, D); `to` may be `from`
  View cos, sin;        // (B|1, P, R/2)
  View positions;       // (B|1, S), or null: token i is at position i
  bool interleaved = false, conjugate = false;
};

}  // namespace fastattn
