// Weights and dS of a tile, recomputed from the row statistics:
//
//   w = exp2(score - largest - log_sum);  dS = w * (dropout(dP) - delta);  delta_i = sum_d dO_id O_id - dlse_i
//
// dS is the gradient with respect to score + bias.
#pragma once

#include "dropout.h"

namespace fastattn::cuda {

// Of one query row.
struct RowStatistics {
  float largest, log_sum, delta;
};

// s: finished scores -> weights as V sees them, after dropout;  dp: dO V^T -> dS.  `row_of(band, n, r)` gives the
// statistics of an accumulator's query.
template <class Place, int kBands, int kColumns, class RowOf>
FASTATTN_DEVICE void weights_and_gradient(float (&s)[kBands][kColumns][4], float (&dp)[kBands][kColumns][4],
                                          const Attention& p, const Place& at, bool careful, RowOf row_of) {
  uint32_t bits[kBands];
  if (p.dropout_seed) keep_bits<kBands, kColumns>(bits, p, at);
  FASTATTN_UNROLL
  for (int band = 0; band < kBands; ++band) {
    FASTATTN_UNROLL
    for (int n = 0; n < kColumns; ++n) {
      FASTATTN_UNROLL
      for (int r = 0; r < 4; ++r) {
        const RowStatistics row = row_of(band, n, r);
        float& weight = s[band][n][r];
        float& gradient = dp[band][n][r];
        const bool hidden = careful && weight == -infinity();
        weight = exp2_approx(fmaf(weight, p.multiplier, -row.largest) - row.log_sum);
        if (hidden) weight = 0.0f;
        float dropped = weight;
        if (p.dropout_seed) {
          const bool keep = has(bits[band], n, r);
          dropped = keep ? weight * p.keep_scale : 0.0f;
          gradient = keep ? gradient * p.keep_scale : 0.0f;
        }
        gradient = weight * (gradient - row.delta);
        if (careful) {
          // A NaN of a row or key that is masked here must not pass through 0 * NaN; one that is seen must come back.
          if (weight == 0.0f) gradient = 0.0f;
          dropped = weight == 0.0f ? 0.0f : dropped + row.delta * 0.0f;
        }
        weight = dropped;
      }
    }
  }
}

// dS -> gradient with respect to scale * q.k: times 1 - tanh^2 under a softcap.  The products are computed once more
// rather than kept.  raw(s) computes them.
template <int kBands, int kColumns, class Raw>
FASTATTN_DEVICE void through_softcap(float (&ds)[kBands][kColumns][4], float (&s)[kBands][kColumns][4],
                                     const Attention& p, Raw raw) {
  raw(s);
  FASTATTN_UNROLL
  for (int band = 0; band < kBands; ++band) {
    FASTATTN_UNROLL
    for (int n = 0; n < kColumns; ++n) {
      FASTATTN_UNROLL
      for (int r = 0; r < 4; ++r) {
        const float t = tanh_of(s[band][n][r] * p.softcap_in);
        ds[band][n][r] *= 1.0f - t * t;
      }
    }
  }
}

}  // namespace fastattn::cuda
