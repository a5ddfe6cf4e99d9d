// Keys that a slope (ALiBi) puts out of reach: their weights are zero in this precision, whatever q and k are.
//
// |q.k| <= |q||k|.  So with B = scale max|q| max|k| the largest score of a row is no less than -B - slope * (distance
// of the nearest key it sees), and that of a key at distance d no more than B - slope * d.
#pragma once

#include "pack.h"
#include "scores.h"

namespace fastattn::cpu::FASTATTN_ISA {

// At least the norm of the longest of the rows that count; not finite if one of them is not.  `row` has room for one in
// whole vectors.
template <class T, class Counts>
inline T norm_bound(const RowSource<T>& source, i64 first, i64 count, T* row, Counts counts) {
  const i64 width = round_up(source.columns, kLanes<T>);
  std::memset(row, 0, width * sizeof(T));
  T largest = 0, zero = 0;
  for (i64 i = first; i < first + count; ++i) {
    if (!counts(i)) continue;
    source.load(i, row);
    Vec<T> squares = {};
    for (i64 d = 0; d < width; d += kLanes<T>) squares += load(row + d) * load(row + d);
    const T square = reduce_add<T>(squares);
    largest = larger(largest, square);
    zero += square * T(0);
  }
  // squares may have been flushed to zero, and rotated operands are rounded once more
  return static_cast<T>(1.02 * __builtin_sqrt(largest + zero + width * __builtin_exp2(sizeof(T) == 4 ? -126 : -1022)));
}

template <class T>
class Reach {
 public:
  Reach() = default;
  explicit Reach(const Scorer<T>& scorer) : scorer_(&scorer) {
    const Problem& p = *scorer.problem;
    if (!p.slopes || p.query_length == 0 || !scorer.plain || scorer.masked_by_element || p.row_intervals) return;
    slope_ = static_cast<double>(scorer.slope) * scorer.scale;
    const double first = scorer.geometry.position(0), last = scorer.geometry.position(p.query_length - 1);
    const double farthest = larger(last, static_cast<double>(p.key_length) - first);
    ends_ = slope_ > 0 && slope_ * (farthest - kWorth) > kZero;
  }

  // Whether enough may be out of reach for norms to be worth their time.
  bool ends() const { return ends_; }

  // At least the norms of the keys that anybody sees, and of queries [first, first + count) that see any: what lies
  // in the others must not show.  NaN with a value that is not finite, which is multiplied by its zero.
  T key_norm(const RowSource<T>& keys, const RowSource<T>& values, T* row) const {
    const BatchGeometry& geometry = scorer_->geometry;
    const i64 low = geometry.visible(0).low, high = geometry.visible(scorer_->problem->query_length - 1).high;
    for (i64 j = low; j < high; ++j) {
      values.load(j, row);
      if (!all_finite(row, values.columns)) return static_cast<T>(__builtin_nan(""));
    }
    return norm_bound(keys, low, high - low, row, [](i64) { return true; });
  }
  T query_norm(const RowSource<T>& queries, i64 first, i64 count, T* row) const {
    return norm_bound(queries, first, count, row, [&](i64 i) { return !scorer_->geometry.visible(i).empty(); });
  }

  // What is left of keys [low, high) without those at either end that are out of reach for all queries i0 to i1, whose
  // norms times the keys' are at most `norms`.
  Interval clip(i64 i0, i64 i1, Interval keys, T norms) const {
    const BatchGeometry& geometry = scorer_->geometry;
    const i64 nearest = larger(nearest_key(i0), nearest_key(i1));  // of those between it is no farther
    const double limit = (kZero + 2 * scorer_->scale * static_cast<double>(norms)) / slope_;
    if (!(limit < 0x1p50) || nearest > i64{1} << 50) return keys;  // also where a norm is not finite
    const i64 distance = nearest + static_cast<i64>(limit) + 1;
    return {larger(keys.low, geometry.position(i0) - distance),
            smaller(keys.high, geometry.position(i1) + distance + 1)};
  }

 private:
  // exp of less than minus this is zero, not even a denormal number
  static constexpr double kZero = sizeof(T) == 4 ? 104 : 746;
  static constexpr double kWorth = 512;  // so many keys beyond it are less than their norms cost

  i64 nearest_key(i64 i) const {
    const i64 at = scorer_->geometry.position(i);
    const Interval seen = scorer_->geometry.visible(i);
    if (seen.empty()) return i64{1} << 61;
    return larger(i64{0}, larger(seen.low - at, at - (seen.high - 1)));
  }

  const Scorer<T>* scorer_ = nullptr;
  double slope_ = 0;
  bool ends_ = false;
};

}  // namespace fastattn::cpu::FASTATTN_ISA
