// Weights and dS of a warpgroup's tile, recomputed from the row statistics (attention/score_gradient.h has the
// formulas).
//
// In two steps, since the product dP comes later than the scores: the exponentials run while it is under way.
#pragma once

#include "../attention/score_gradient.h"
#include "softmax.h"

namespace fastattn::cuda {

// s: finished scores -> weights before dropout.  `row_of(i)` gives the statistics of an accumulator's query.  Returns
// bits whose sign is never set, and which all weights are in.
template <int N, class RowOf>
FASTATTN_DEVICE uint32_t weights_of(float (&s)[N], float multiplier, bool careful, RowOf row_of) {
  uint32_t bits = 0;
  FASTATTN_UNROLL
  for (int i = 0; i < N; ++i) {
    const RowStatistics row = row_of(i);
    const bool hidden = careful && s[i] == -infinity();
    s[i] = exp2_approx(fmaf(s[i], multiplier, -row.largest) - row.log_sum);
    if (hidden) s[i] = 0.0f;  // its row's statistics may be NaN
    bits |= bits_of(s[i]);
  }
  return bits;
}

// A weight as V sees it, after dropout.  Where masks are looked at (`careful`), a NaN of a row or key that is masked
// must not pass through 0 * NaN, here or below; one that is seen must come back.
FASTATTN_DEVICE float seen_weight(float weight, float delta, bool keep, float keep_scale, bool careful) {
  const float dropped = keep ? weight * keep_scale : 0.0f;
  if (!careful) return dropped;
  return weight == 0.0f ? 0.0f : dropped + delta * 0.0f;
}

// dS from an element of dO V^T.
FASTATTN_DEVICE float score_gradient(float weight, float gradient, float delta, bool keep, float keep_scale,
                                     bool careful) {
  if (careful && weight == 0.0f) return 0.0f;
  return weight * ((keep ? gradient * keep_scale : 0.0f) - delta);
}

// s: weights -> weights as V sees them, after dropout;  dp: dO V^T -> dS.
template <class Config, class Place, int N, class RowOf>
FASTATTN_DEVICE void gradient_of(float (&s)[N], float (&dp)[N], const Attention& p, const Place& at, bool careful,
                                 RowOf row_of) {
  const auto one = [&](float& weight, float& gradient, float delta, bool keep, float keep_scale) {
    gradient = score_gradient(weight, gradient, delta, keep, keep_scale, careful);
    weight = seen_weight(weight, delta, keep, keep_scale, careful);
  };
  if constexpr (!Config::kPlain) {
    if (p.dropout_seed) {
      in_parts(s, [&](auto& part, int first) {
        constexpr int kColumns = sizeof(part) / sizeof(part[0][0]);
        uint32_t bits[1];
        keep_bits<1, kColumns>(bits, p, part_of(at, first));
        FASTATTN_UNROLL
        for (int i = 0; i < 4 * kColumns; ++i)
          one(s[4 * (first / 8) + i], dp[4 * (first / 8) + i], row_of(4 * (first / 8) + i).delta, bits[0] >> i & 1,
              p.keep_scale);
      });
      return;
    }
  }
  FASTATTN_UNROLL
  for (int i = 0; i < N; ++i) one(s[i], dp[i], row_of(i).delta, true, 1.0f);
}

// dS -> gradient with respect to scale * q.k, given the raw products once more.
template <int N>
FASTATTN_DEVICE void through_softcap(float (&ds)[N], const float (&raw)[N], const Attention& p) {
  FASTATTN_UNROLL
  for (int i = 0; i < N; ++i) {
    const float t = tanh_of(raw[i] * p.softcap_in);
    ds[i] *= 1.0f - t * t;
  }
}

}  // namespace fastattn::cuda
