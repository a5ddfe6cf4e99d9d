// A dense mask that lets every query see keys in a row is as good as an interval for each: a causal mask or a window
// that was written out, padding.  It is read once for all heads that share it, and no more.
#pragma once

#include "arena.h"
#include "geometry.h"

namespace fastattn::cpu::FASTATTN_ISA {

// The problem with its dense mask as intervals, or the problem itself if the mask is of another kind.
class RowIntervals {
 public:
  RowIntervals(const Problem& problem, const Parallel& parallel) : given_(&problem), mask_(problem.dense_mask) {
    // a few queries leave little to save, and only dense rows are read fast enough
    if (!mask_ || problem.query_length < 16 || mask_.stride[3] != 1) return;
    for (int d = 0; d < 3; ++d) size_[d] = mask_.stride[d] ? mask_.size[d] : 1;
    intervals_ = Buffer<Interval>(size_[0] * size_[1] * size_[2]);
    parallel.run(size_[0] * size_[1] * ceil_div(size_[2], kRows), &RowIntervals::run_item, this);
    if (!all_) return;
    own_ = Buffer<Problem>(1);
    Problem& own = *new (own_.data()) Problem(problem);
    own.dense_mask = {};
    View& view = own.row_intervals;
    view.data = intervals_.data();
    view.dtype = DType::kInt64;
    view.size[3] = 2, view.stride[3] = 1;
    for (i64 stride = 2, d = 2; d >= 0; stride *= size_[d--])
      view.size[d] = size_[d], view.stride[d] = size_[d] > 1 ? stride : 0;
    given_ = &own;
  }
  RowIntervals(const RowIntervals&) = delete;
  RowIntervals& operator=(const RowIntervals&) = delete;

  const Problem& problem() const { return *given_; }

 private:
  static constexpr i64 kRows = 64;

  static void run_item(void* self, i64 index) { static_cast<RowIntervals*>(self)->run(index); }
  void run(i64 index) {
    const i64 blocks = ceil_div(size_[2], kRows), unit = index / blocks, first = index % blocks * kRows;
    for (i64 i = first; i < smaller(first + kRows, size_[2]); ++i) {
      if (!__atomic_load_n(&all_, __ATOMIC_RELAXED)) return;  // as soon as one row is of another kind
      const QueryRows row{unit / size_[1], unit % size_[1], 1, i, 1};
      const Interval seen = left_by(mask_, uint8_t{0}, row, 0, {0, mask_.size[3]});
      if (!hides_nothing(mask_, row, 0, seen)) __atomic_store_n(&all_, false, __ATOMIC_RELAXED);
      intervals_.data()[unit * size_[2] + i] = seen;
    }
  }

  const Problem* given_;
  const View& mask_;
  i64 size_[3] = {1, 1, 1};
  Buffer<Interval> intervals_;
  bool all_ = true;
  Buffer<Problem> own_;  // hardly any call needs one
};

}  // namespace fastattn::cpu::FASTATTN_ISA
