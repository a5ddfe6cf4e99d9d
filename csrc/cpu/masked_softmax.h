// Masked softmax over rows that are already there, and its gradients.
//
// Each row is read once and written once; in between it lives in the thread's scratch.  Interval masks give the part
// of a row that is looked at: what lies outside is written as zero and never read.  The backward reads the output and
// its gradient alone: where a place is masked the output is 0, so no mask is evaluated again.
//
// Parameter gradients: a work item owns rows of one (batch, head), or, where a dense bias is shared between batches or
// heads, the rows of all that share it.  Partial sums are double, per item, and are added in a fixed order; the split
// into items follows from the shape alone.  Results are the same bits for any number of threads.
#pragma once

#include "../common/rows.h"
#include "arena.h"
#include "scores.h"

namespace fastattn::cpu::FASTATTN_ISA {

// Elements a work item should have: enough to hide the cost of handing it out, few enough to stay in a core's cache.
constexpr i64 kItemElements = i64{1} << 15;

// Writes a row of `n` elements with unit stride: `values` at [seen.low, seen.high), zero beside it.
template <class T>
inline void write_row(DType type, const T* values, Interval seen, i64 n, char* target) {
  const i64 size = element_size(type);
  if (seen.empty()) seen = {0, 0};
  std::memset(target, 0, seen.low * size);
  store_row(type, values, seen.high - seen.low, target + seen.low * size);
  std::memset(target + seen.high * size, 0, (n - seen.high) * size);
}

template <class T>
class SoftmaxRows {
 public:
  SoftmaxRows(const Problem& problem, const SoftmaxForward& views) : p(problem), in(views.scores), out(views.out) {
    block = larger(i64{1}, kItemElements / larger(p.key_length, i64{1}));
    blocks = ceil_div(p.query_length, block);
  }

  i64 items() const { return p.batch * p.query_heads * blocks; }
  static void run_item(void* self, i64 index) { static_cast<const SoftmaxRows*>(self)->run(index); }

 private:
  const Problem& p;
  const View &in, &out;
  i64 block, blocks;

  struct Scratch {
    T *row, *temp;
  };

  Scratch layout(Arena& arena) const {
    const i64 width = round_up(p.key_length, kLanes<T>);
    return {arena.take<T>(width), arena.take<T>(width)};
  }

  void run(i64 index) const {
    const i64 first = index % blocks * block, b = index / blocks / p.query_heads, h = index / blocks % p.query_heads;
    Arena measure(nullptr);
    layout(measure);
    Arena arena(thread_scratch(measure.used()));
    const Scratch s = layout(arena);
    FlushScope flush;
    const Scorer<T> scorer(p, b, h);
    for (i64 i = first; i < smaller(first + block, p.query_length); ++i) row(scorer, i, s);
  }

  void row(const Scorer<T>& scorer, i64 i, const Scratch& s) const {
    const Interval seen = scorer.clip(i, 0, 0, p.key_length);
    if (!seen.empty()) {
      const Interval live = masked_scores(scorer, i, seen, s);
      const T top = row_max(s.row, live.low, live.high);
      const T total =
          top == -kInfinity<T>
              ? T(0)
              : reduce_add<T>(row_exp<false, PlainMode<T>::kExpDegree>(s.row, live.low, live.high, top, scorer.factor));
      if (total >= T(1)) {
        const T share = T(1) / total;
        for (i64 j = live.low; j < live.high; j += kLanes<T>) store(s.row + j, load(s.row + j) * share);
      } else {
        without_numbers(scorer, i, seen, s);
      }
    }
    write_row(out.dtype, s.row + (seen.empty() ? 0 : seen.low), seen, p.key_length,
              out.mutable_at(scorer.b, scorer.h, i));
  }

  // The scores of row i, in units of the scorer's, -inf where masked.
  Interval masked_scores(const Scorer<T>& scorer, i64 i, Interval seen, const Scratch& s) const {
    load_row(in.dtype, in.at(scorer.b, scorer.h, i, seen.low), in.stride[3], seen.high - seen.low, s.row + seen.low);
    return scorer.apply(i, 0, 0, round_up(p.key_length, kLanes<T>), s.row, s.temp, static_cast<T*>(nullptr));
  }

  // A row whose weights are no numbers (it sees NaN or +inf) or that is masked throughout: NaN where visible, 0 else.
  void without_numbers(const Scorer<T>& scorer, i64 i, Interval seen, const Scratch& s) const {
    masked_scores(scorer, i, seen, s);
    for (i64 j = seen.low; j < seen.high; ++j)
      s.row[j] = s.row[j] == -kInfinity<T> ? T(0) : static_cast<T>(__builtin_nan(""));
  }
};

template <class T>
class SoftmaxGradients {
 public:
  SoftmaxGradients(const Problem& problem, const SoftmaxBackward& views) : p(problem), v(views) {
    const View& bias = v.ddense_bias;
    own_rows = bias && bias.size[2] == p.query_length;
    own_columns = bias && bias.size[3] == p.key_length;
    shared_batch = own_rows && bias.size[0] != p.batch;
    shared_heads = own_rows && bias.size[1] != p.query_heads;
    bias_columns = own_columns ? p.key_length : 1;
    // Eight rows at least, and enough of them that the items' tables together stay below a quarter of the scores.
    const i64 columns = larger(p.key_length, i64{1});
    block = larger(i64{8}, kItemElements / columns);
    if (v.dtable) block = larger(block, ceil_div(4 * v.dtable.size[2], columns));
    block = larger(i64{1}, smaller(block, p.query_length));
    blocks = ceil_div(p.query_length, block);
    const i64 parts = p.batch * p.query_heads * blocks;
    if (v.dslopes) slope_parts = Buffer<double>(parts);
    if (v.dtable) table_parts = Buffer<double>(parts * v.dtable.size[2]);
    if (bias && !own_rows) bias_parts = Buffer<double>(parts * bias_columns);
  }

  i64 items() const { return (shared_batch ? 1 : p.batch) * (shared_heads ? 1 : p.query_heads) * blocks; }
  static void run_item(void* self, i64 index) { static_cast<const SoftmaxGradients*>(self)->run(index); }

  // After all items: adds the parts up.
  void finish() const {
    if (v.dslopes) reduce(v.dslopes, slope_parts.data(), 1, -1);
    if (v.dtable) reduce(v.dtable, table_parts.data(), v.dtable.size[2], 1);
    if (v.ddense_bias && !own_rows) reduce_bias();
  }

 private:
  static constexpr DType kOwn = sizeof(T) == 4 ? DType::kFloat32 : DType::kFloat64;

  const Problem& p;
  const SoftmaxBackward& v;
  bool own_rows, own_columns, shared_batch, shared_heads;
  i64 bias_columns, block, blocks;
  Buffer<double> slope_parts, table_parts, bias_parts;  // (B, H, blocks, ...)

  struct Scratch {
    T *out, *grad;  // of the part of a row that is looked at, from its first column on
    double* bias;   // (rows of the block, bias_columns), where several rows of scores share one of the bias
  };

  bool sums_bias() const { return own_rows && (shared_batch || shared_heads || !own_columns); }

  Scratch layout(Arena& arena) const {
    const i64 width = round_up(p.key_length, kLanes<T>);
    Scratch s;
    s.out = arena.take<T>(width);
    s.grad = arena.take<T>(width);
    s.bias = arena.take<double>(sums_bias() ? block * bias_columns : 0);
    return s;
  }

  void run(i64 index) const {
    const i64 heads = shared_heads ? 1 : p.query_heads;
    const i64 r = index % blocks, h = index / blocks % heads, b = index / blocks / heads;
    const i64 first = r * block, last = smaller(first + block, p.query_length);
    Arena measure(nullptr);
    layout(measure);
    Arena arena(thread_scratch(measure.used()));
    const Scratch s = layout(arena);
    if (sums_bias()) std::memset(s.bias, 0, (last - first) * bias_columns * sizeof(double));
    for (i64 batch = b; batch < (shared_batch ? p.batch : b + 1); ++batch)
      for (i64 head = h; head < (shared_heads ? p.query_heads : h + 1); ++head) rows(batch, head, r, first, last, s);
    if (sums_bias())
      for (i64 i = first; i < last; ++i)
        store_row(v.ddense_bias.dtype, s.bias + (i - first) * bias_columns, bias_columns,
                  v.ddense_bias.mutable_at(shared_batch ? 0 : b, shared_heads ? 0 : h, i));
  }

  void rows(i64 b, i64 h, i64 r, i64 first, i64 last, const Scratch& s) const {
    const Scorer<T> scorer(p, b, h);
    const i64 part = (b * p.query_heads + h) * blocks + r;
    double slope = 0;
    double* const table = v.dtable ? table_parts.data() + part * v.dtable.size[2] : nullptr;
    double* const bias = v.ddense_bias && !own_rows ? bias_parts.data() + part * bias_columns : nullptr;
    if (table) std::memset(table, 0, v.dtable.size[2] * sizeof(double));
    if (bias) std::memset(bias, 0, bias_columns * sizeof(double));
    for (i64 i = first; i < last; ++i) {
      const Interval seen = scorer.geometry.visible(i);
      score_gradient(scorer, i, seen, s);
      if (v.ddense_bias && own_rows && !sums_bias())
        write_row(v.ddense_bias.dtype, s.out, seen, p.key_length, v.ddense_bias.mutable_at(b, h, i));
      if (!seen.empty()) {
        if (v.dslopes) slope += weighted_by_distance(scorer, i, seen, s.out);
        if (table) add_to_table(scorer, i, seen, s.out, table);
        if (bias) add_to_bias(seen, s.out, bias);
        if (sums_bias()) add_to_bias(seen, s.out, s.bias + (i - first) * bias_columns);
      }
      if (v.dscores) {
        for (i64 k = 0; k < seen.high - seen.low; k += kLanes<T>) store(s.grad + k, load(s.out + k) * scorer.scale);
        write_row(v.dscores.dtype, s.grad, seen, p.key_length, v.dscores.mutable_at(b, h, i));
      }
    }
    if (v.dslopes) slope_parts.data()[part] = slope;
  }

  // dS = y * (dy - sum(y dy)) of row i into s.out, 0 where y is, the last vector padded with zeros.  Whatever stands in
  // dy where y is 0 is not seen: those places are masked, or too small to matter.
  void score_gradient(const Scorer<T>& scorer, i64 i, Interval seen, const Scratch& s) const {
    if (seen.empty()) return;
    constexpr int n = kLanes<T>;
    const i64 count = seen.high - seen.low, whole = round_down(count, n);
    const T* const y = values(v.out, scorer, i, seen, s.out);
    const T* const dy = values(v.grad_out, scorer, i, seen, s.grad);
    T last_y[n] = {}, last_dy[n] = {};
    std::memcpy(last_y, y + whole, (count - whole) * sizeof(T));
    std::memcpy(last_dy, dy + whole, (count - whole) * sizeof(T));

    const Vec<T> zero = {};
    const auto product = [&](const T* a, const T* b) {
      const Vec<T> left = load(a), both = left * load(b);
      return left == T(0) ? zero : both;
    };
    Vec<T> sum = product(last_y, last_dy), other = zero;
    i64 k = 0;
    for (; k + 2 * n <= whole; k += 2 * n) {
      sum += product(y + k, dy + k);
      other += product(y + k + n, dy + k + n);
    }
    if (k < whole) sum += product(y + k, dy + k);
    const T delta = reduce_add<T>(sum + other);

    const auto gradient = [&](const T* a, const T* b) {
      const Vec<T> left = load(a), ds = left * (load(b) - delta);
      return left == T(0) ? zero : ds;
    };
    for (k = 0; k < whole; k += n) store(s.out + k, gradient(y + k, dy + k));
    if (whole < count) store(s.out + whole, gradient(last_y, last_dy));
  }

  // Columns [seen.low, seen.high) of row i: where they are if they are of the type T, else converted into `temp`.
  static const T* values(const View& view, const Scorer<T>& scorer, i64 i, Interval seen, T* temp) {
    const char* const source = view.at(scorer.b, scorer.h, i, seen.low);
    if (view.dtype == kOwn && view.stride[3] == 1) return reinterpret_cast<const T*>(source);
    load_row(view.dtype, source, view.stride[3], seen.high - seen.low, temp);
    return temp;
  }

  static double sum(const T* row, i64 low, i64 high) {
    Vec<T> total = {};
    i64 j = low;
    for (; j + kLanes<T> <= high; j += kLanes<T>) total += load(row + j);
    double rest = 0;
    for (; j < high; ++j) rest += row[j];
    return rest + reduce_add<T>(total);
  }

  // sum dS |distance|, over whole vectors: the last one is padded with zeros.
  static double weighted_by_distance(const Scorer<T>& scorer, i64 i, Interval seen, const T* ds) {
    Vec<T> lane;
    for (int k = 0; k < kLanes<T>; ++k) lane[k] = static_cast<T>(k);
    Vec<T> total = {};
    for (i64 k = 0; k < seen.high - seen.low; k += kLanes<T>) {
      const Vec<T> distance = lane + static_cast<T>(seen.low + k - scorer.geometry.position(i));
      total += load(ds + k) * (distance < T(0) ? -distance : distance);
    }
    return reduce_add<T>(total);
  }

  static void add_to_table(const Scorer<T>& scorer, i64 i, Interval seen, const T* ds, double* table) {
    i64 shift;
    const Interval near = scorer.table_span(i, 0, seen, &shift);
    table[0] += sum(ds, 0, near.low - seen.low);
    for (i64 j = near.low; j < near.high; ++j) table[j + shift] += ds[j - seen.low];
    table[scorer.table_size - 1] += sum(ds, near.high - seen.low, seen.high - seen.low);
  }

  void add_to_bias(Interval seen, const T* ds, double* bias) const {
    const i64 count = seen.high - seen.low;
    if (own_columns)
      for (i64 k = 0; k < count; ++k) bias[seen.low + k] += ds[k];
    else
      bias[0] += sum(ds, 0, count);
  }

  // gradient (B|1, H, n) = sign * the sum of its parts over blocks, and over the batch where it has none.
  void reduce(const View& gradient, const double* parts, i64 n, double sign) const {
    Buffer<double> row(n);
    for (i64 b = 0; b < gradient.size[0]; ++b)
      for (i64 h = 0; h < p.query_heads; ++h) {
        std::memset(row.data(), 0, n * sizeof(double));
        const bool own = gradient.size[0] == p.batch;
        for (i64 batch = own ? b : 0; batch < (own ? b + 1 : p.batch); ++batch)
          add_parts(parts, batch, h, n, row.data());
        for (i64 k = 0; k < n; ++k) row.data()[k] *= sign;
        store_row(gradient.dtype, row.data(), n, gradient.mutable_at(b, h));
      }
  }

  void reduce_bias() const {
    const View& gradient = v.ddense_bias;
    Buffer<double> row(bias_columns);
    for (i64 b = 0; b < gradient.size[0]; ++b)
      for (i64 h = 0; h < gradient.size[1]; ++h) {
        std::memset(row.data(), 0, bias_columns * sizeof(double));
        const bool own_batch = gradient.size[0] == p.batch, own_head = gradient.size[1] == p.query_heads;
        for (i64 batch = own_batch ? b : 0; batch < (own_batch ? b + 1 : p.batch); ++batch)
          for (i64 head = own_head ? h : 0; head < (own_head ? h + 1 : p.query_heads); ++head)
            add_parts(bias_parts.data(), batch, head, bias_columns, row.data());
        store_row(gradient.dtype, row.data(), bias_columns, gradient.mutable_at(b, h));
      }
  }

  void add_parts(const double* parts, i64 b, i64 h, i64 n, double* sum) const {
    for (i64 r = 0; r < blocks; ++r) {
      const double* const part = parts + ((b * p.query_heads + h) * blocks + r) * n;
      for (i64 k = 0; k < n; ++k) sum[k] += part[k];
    }
  }
};

template <class T>
inline void softmax_forward(const Problem& problem, const SoftmaxForward& views, const Parallel& parallel) {
  SoftmaxRows<T> kernel(problem, views);
  parallel.run(kernel.items(), &SoftmaxRows<T>::run_item, &kernel);
}

template <class T>
inline void softmax_backward(const Problem& problem, const SoftmaxBackward& views, const Parallel& parallel) {
  SoftmaxGradients<T> kernel(problem, views);
  parallel.run(kernel.items(), &SoftmaxGradients<T>::run_item, &kernel);
  kernel.finish();
}

}  // namespace fastattn::cpu::FASTATTN_ISA
