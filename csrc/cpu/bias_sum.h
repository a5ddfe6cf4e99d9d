// The gradient of a dense bias that the batch elements share, summed where dS is computed anyway.
//
// The batch is cut into groups, each summed up by the items that compute it, one batch element after the other, and
// the groups' sums are added in their order: which groups there are follows from the shape alone.  It takes an array
// (Hq, Sq, Sk) for each group, so it is for short sequences and many batch elements (windows, say); the others have
// BiasGradient, which computes dS once more.
#pragma once

#include "arena.h"
#include "convert.h"

namespace fastattn::cpu::FASTATTN_ISA {

template <class Acc>
class BiasSum {
 public:
  // `units`: work items of one batch element.
  void plan(const Problem& p, const View& gradient, i64 units) {
    const i64 size = p.query_heads * p.query_length * p.key_length;
    if (!gradient || gradient.size[0] != 1 || gradient.size[2] != p.query_length || gradient.size[3] != p.key_length)
      return;
    if (p.batch * p.query_heads <= 1 || size == 0 || units == 0) return;
    const i64 bytes = size * i64{sizeof(Acc)};
    i64 groups = larger(smaller(ceil_div(kItems, units), kLittle / bytes), ceil_div(kLeastItems, units));
    groups = smaller(groups, p.batch);
    if (groups > kMost / bytes) return;
    each_ = ceil_div(p.batch, groups);
    groups_ = ceil_div(p.batch, each_);
    heads_ = p.query_heads, queries_ = p.query_length, keys_ = p.key_length, batch_ = p.batch;
    sums_ = Buffer<Acc>(groups_ * size);
  }

  explicit operator bool() const { return groups_ > 0; }
  i64 groups() const { return groups_; }
  i64 first(i64 group) const { return group * each_; }
  i64 last(i64 group) const { return smaller((group + 1) * each_, batch_); }

  // Row i of what head h of batch element b is added to.
  Acc* row(i64 b, i64 h, i64 i) const { return sums_.data() + ((b / each_ * heads_ + h) * queries_ + i) * keys_; }

  void clear(i64 group, i64 h, i64 first_key, i64 last_key) const {
    for (i64 i = 0; i < queries_; ++i)
      std::memset(row(first(group), h, i) + first_key, 0, (last_key - first_key) * sizeof(Acc));
  }

  static void add(Acc* sum, const Acc* ds, i64 low, i64 high) {
#pragma GCC ivdep  // two arrays
    for (i64 j = low; j < high; ++j) sum[j] += ds[j];
  }

  void write(const View& gradient, const Parallel& parallel) const {
    struct Context {
      const BiasSum& self;
      const View& gradient;
    } context{*this, gradient};
    parallel.run(
        gradient.size[1] * queries_,
        [](void* context, i64 index) {
          const auto& [self, gradient] = *static_cast<const Context*>(context);
          self.write_row(gradient, index / self.queries_, index % self.queries_);
        },
        &context);
  }

 private:
  static constexpr i64 kItems = 128, kLeastItems = 32;  // wanted work items
  static constexpr i64 kLittle = i64{8} << 20, kMost = i64{64} << 20;

  i64 groups_ = 0, each_ = 1, heads_ = 0, queries_ = 0, keys_ = 0, batch_ = 0;
  Buffer<Acc> sums_;

  // Of the bias's own head, or of all in the place of the first.
  void write_row(const View& gradient, i64 head, i64 i) const {
    const bool own = gradient.size[1] == heads_;
    Acc* const total = row(0, head, i);
    FlushScope flush;
    for (i64 h = own ? head : 0; h < (own ? head + 1 : heads_); ++h)
      for (i64 group = 0; group < groups_; ++group)
        if (Acc* const part = row(first(group), h, i); part != total) add(total, part, 0, keys_);
    store_row(gradient.dtype, total, keys_, gradient.mutable_at(0, head, i));
  }
};

}  // namespace fastattn::cpu::FASTATTN_ISA
