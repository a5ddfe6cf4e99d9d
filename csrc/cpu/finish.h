// The last step of a row: from the running maximum, sum and accumulator of its softmax to the output, lse and
// statistics.
#pragma once

#include "scores.h"

namespace fastattn::cpu::FASTATTN_ISA {

// What a row is multiplied with at the end: zero without keys, which have no weight whatever their scores.  Weights are
// recomputed with it as well, not with its logarithm: the rounding of that is an error of all weights of the row, and
// grows with it.
template <class Acc>
struct RowEnd {
  Acc scale = 0, lse = kInfinity<Acc>;
};

// The sink joins the denominator at the end, in double: a large one cannot overflow, a small one costs no rescaling.
template <class Acc>
inline RowEnd<Acc> row_end_with_sink(const Scorer<Acc>& scorer, Acc maximum, Acc row_sum) {
  const Problem& p = *scorer.problem;
  RowEnd<Acc> end;
  const double sink = *reinterpret_cast<const Acc*>(p.sink.at(scorer.b, scorer.h));
  const double own = maximum * (scorer.plain ? p.scale : 1.0);
  double sum = row_sum, shrink = 1;
  double top = sum == 0 ? -__builtin_inf() : own;
  if (sum == 0 && sink == -__builtin_inf()) return end;
  if (sink > top) {
    shrink = __builtin_exp(top - sink);
    sum = sum * shrink + 1;
    top = sink;
  } else if (sink > -__builtin_inf()) {
    sum += __builtin_exp(sink - top);
  }
  end.scale = static_cast<Acc>(shrink / sum);
  end.lse = static_cast<Acc>(top + __builtin_log(sum));
  return end;
}

// Without `logarithm`, the scale alone.
template <class Acc>
inline RowEnd<Acc> row_end(const Scorer<Acc>& scorer, Acc maximum, Acc sum, bool logarithm = true) {
  const Problem& p = *scorer.problem;
  if (p.sink) return row_end_with_sink(scorer, maximum, sum);
  RowEnd<Acc> end;
  if (sum == 0) return end;
  end.scale = 1 / sum;
  if (!logarithm) return end;
  const double top = static_cast<double>(maximum) * (scorer.plain ? p.scale : 1.0);
  // one logarithm a row, in its own precision: in short rows it is a good part of the work
  end.lse = static_cast<Acc>(top + (sizeof(Acc) == 4 ? __builtin_logf(sum) : __builtin_log(sum)));
  return end;
}

// Writes row i of the scorer's head.  `accumulator` is scaled in place, `width` numbers in whole vectors.
template <class Acc>
inline void finish_row(const Scorer<Acc>& scorer, const ForwardOutput& o, i64 i, Acc maximum, const RowEnd<Acc>& end,
                       Acc* accumulator, i64 width) {
  const i64 b = scorer.b, h = scorer.h;
  if (o.statistics) {
    Acc* const statistics = reinterpret_cast<Acc*>(o.statistics.mutable_at(b, h, i));
    statistics[0] = maximum == -kInfinity<Acc> ? 0 : maximum;
    statistics[1] = end.scale;
  }
  if (o.lse) *reinterpret_cast<Acc*>(o.lse.mutable_at(b, h, i)) = end.lse;
  char* const target = o.out.mutable_at(b, h, i);
  const i64 n = scorer.problem->value_dim;
  if (store_scaled(o.out.dtype, accumulator, end.scale, n, target)) return;
  for (i64 d = 0; d < width; d += kLanes<Acc>) store(accumulator + d, load(accumulator + d) * end.scale);
  store_row(o.out.dtype, accumulator, n, target);
}

template <class Acc>
inline void finish_row(const Scorer<Acc>& scorer, const ForwardOutput& o, i64 i, Acc maximum, Acc sum, Acc* accumulator,
                       i64 width) {
  finish_row(scorer, o, i, maximum, row_end(scorer, maximum, sum, bool(o.lse)), accumulator, width);
}

}  // namespace fastattn::cpu::FASTATTN_ISA
