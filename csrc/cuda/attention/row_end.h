// What becomes of a row when all its keys have been seen: the sink joins the denominator, lse and statistics are
// stored.
#pragma once

#include "scores.h"

namespace fastattn::cuda {

struct RowEnd {
  float factor;            // from what was accumulated to the output
  float largest, log_sum;  // to base 2; lse is their sum
  bool empty;
};

// largest: to base 2, -inf (or NaN) of a row that saw nothing; sum: relative to it; sink: a logit, -inf without one.
FASTATTN_DEVICE RowEnd end_row(float largest, float sum, float sink) {
  if (!(largest > -infinity())) largest = -infinity();
  float factor = 1.0f;
  sink *= kLog2E;
  if (sink > -infinity()) {
    const float top = fmaxf(largest, sink);
    factor = exp2_approx(largest - top);
    sum = sum * factor + exp2_approx(sink - top);
    largest = top;
  }
  if (sum == 0.0f) return {0.0f, 0.0f, infinity(), true};
  return {factor / sum, largest, log2f(sum), false};
}

FASTATTN_DEVICE void store_lse(const RowEnd& end, float* lse, i64 row) {
  store_global(lse + row, end.empty ? infinity() : (end.largest + end.log_sum) * kLn2);
}

FASTATTN_DEVICE void store_row_end(const RowEnd& end, float* lse, float* statistics, i64 row) {
  store_lse(end, lse, row);
  // The backward takes the two terms of lse apart: beside scores of 1e9 the logarithm would be lost in their sum.
  store_global(statistics + 2 * row, end.largest);
  store_global(statistics + 2 * row + 1, end.log_sum);
}

}  // namespace fastattn::cuda
