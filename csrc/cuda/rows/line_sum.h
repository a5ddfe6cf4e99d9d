// Sums of dS = y * (dy - delta) along the columns or the diagonals of the scores: gradients of a dense bias and of the
// inner entries of a distance table.
//
// A thread owns a line and walks down its rows, so that neighbouring lanes read neighbouring columns of each row and
// every sum has one order.
#pragma once

#include "../features/geometry.h"
#include "elements.h"
#include "params.h"

namespace fastattn::cuda {

inline constexpr int kLineThreads = 128;

// kUnroll rows at a time: their loads are under way together.
template <class T>
struct LineSum {
  static constexpr int kUnroll = 4;

  const LineSumParams& p;
  int line;
  Element element;

  FASTATTN_DEVICE float number(Stored<T> bits) const {
    if constexpr (sizeof(Stored<T>) == 4) {
      return bits;
    } else {
      return element == Element::kFloat16 ? unpack1<Half>(bits) : unpack1<BFloat16>(bits);
    }
  }

  // The sum over rows first ... last - 1 of one batch and head.
  FASTATTN_DEVICE float rows(int b, int h, int first, int last) const {
    const Interval interval = interval_of(p.features, b);
    const Stored<T>* const y = static_cast<const Stored<T>*>(p.out.data) + b * p.out.batch + h * p.out.head;
    const Stored<T>* const dy =
        static_cast<const Stored<T>*>(p.grad_out.data) + b * p.grad_out.batch + h * p.grad_out.head;
    const float* const delta = p.delta + (static_cast<i64>(b) * p.features.heads + h) * p.features.query_length;
    float sum = 0.0f;
    FASTATTN_NO_UNROLL
    for (int row = first; row < last; row += kUnroll) {
      Stored<T> y_bits[kUnroll], dy_bits[kUnroll];
      float subtract[kUnroll];
      FASTATTN_UNROLL
      for (int n = 0; n < kUnroll; ++n) {
        const int i = row + n;
        y_bits[n] = dy_bits[n] = {};
        subtract[n] = 0.0f;
        if (i >= last) continue;
        const int position = i + interval.offset;
        const int j = p.diagonal ? position + p.first_distance + line : line;
        int lo, hi;
        keys_of_query(p.features, interval, position, lo, hi);
        if (j < larger(lo, 0) || j >= hi) continue;
        y_bits[n] = load_constant(y + i * p.out.row + j);
        dy_bits[n] = load_constant(dy + i * p.grad_out.row + j);
        subtract[n] = load_constant(delta + i);
      }
      FASTATTN_UNROLL
      for (int n = 0; n < kUnroll; ++n) {
        const float weight = number(y_bits[n]);
        if (weight != 0.0f) sum += weight * (number(dy_bits[n]) - subtract[n]);
      }
    }
    return sum;
  }
};

template <class T>
FASTATTN_DEVICE void line_sum(const LineSumParams& p) {
  const int blocks = (p.lines + kLineThreads - 1) / kLineThreads;
  const int part = block_index() / blocks % p.parts, group = block_index() / blocks / p.parts;
  const int h0 = group % p.heads * p.sum_heads, b0 = group / p.heads * p.sum_batches;
  const int line = block_index() % blocks * kLineThreads + thread_index();
  if (line >= p.lines) return;
  const LineSum<T> sum{p, line, p.element};
  const int first = part * p.rows_per_part, last = smaller(first + p.rows_per_part, p.features.query_length);
  float total = 0.0f;
  for (int b = b0; b < b0 + p.sum_batches; ++b)
    for (int h = h0; h < h0 + p.sum_heads; ++h) total += sum.rows(b, h, first, last);
  store_number(p.sums, p.sum_element, (static_cast<i64>(group) * p.parts + part) * p.lines + line, total);
}

}  // namespace fastattn::cuda
