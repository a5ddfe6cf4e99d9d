// Additive scores (Bahdanau et al., 2015): s_ij = sum_d w_d tanh(q_id + k_jd), panel by panel, and nothing of size
// (Sq, Sk, D) anywhere.
//
// One tanh per (i, j, d) would be all of the time, so it is taken apart: with a = e^(2q) and b = e^(2k), which are made
// once per row, n = e^(2(q + k)) - 1 is one multiply-add and tanh(q + k) = n / (n + 2) one addition and one division.
//     |q_d| <= 1/4:  n = (a - 1) + a (b - 1), exact near zero;     beyond it:  n = a b - 1.
// Error, measured over 10^6 pairs per magnitude: at most 2.9e-7, and 1.3e-6 of |q| + |k| where that is below 1, in
// float32 (tanhf(q + k): 1.7e-7).  Time per element, one core, AVX-512: 0.105 ns, against 0.389 ns for tanh(q + k) of
// math.h; AVX2: 0.107 and 0.596 ns.  A hardware reciprocal with one Newton step in place of the division gains nothing.
// Where a or b would leave the range (|q| or |k| above kReach) and where there is a NaN, tanh(q + k) it is.
#pragma once

#include "arena.h"
#include "scores.h"

namespace fastattn::cpu::FASTATTN_ISA {

template <class T>
constexpr T kReach = sizeof(T) == 4 ? T(20) : T(170);  // e^(4 kReach) is finite
template <class T>
constexpr T kNearZero = T(0.25);

// e^(2x) and e^(2x) - 1 for |x| <= kReach, each to about one unit in the last place: Taylor series of e^r - 1 on
// |r| <= ln(2) / 2, r = 2x - n ln(2) with ln(2) in two parts.
template <class T>
FASTATTN_INLINE void exponentials(Vec<T> x, Vec<T>* e, Vec<T>* e_minus_1) {
  constexpr bool single = sizeof(T) == 4;
  using Integer = std::conditional_t<single, int32_t, int64_t>;
  constexpr T shifter = single ? T(12582912) : T(6755399441055744.0);  // leaves the nearest integer in the low bits
  constexpr T ln2_high = single ? T(0.693359375) : T(0.693145751953125);
  constexpr T ln2_low = single ? T(-2.12194440054690583e-4) : T(1.428606820309417232e-6);
  constexpr T inverse_factorial[] = {1,
                                     T(1.0 / 2),
                                     T(1.0 / 6),
                                     T(1.0 / 24),
                                     T(1.0 / 120),
                                     T(1.0 / 720),
                                     T(1.0 / 5040),
                                     T(1.0 / 40320),
                                     T(1.0 / 362880),
                                     T(1.0 / 3628800),
                                     T(1.0 / 39916800),
                                     T(1.0 / 479001600),
                                     T(1.0 / 6227020800.0),
                                     T(1.0 / 87178291200.0)};
  constexpr int last = single ? 7 : 13;
  const Vec<T> shifted = x * static_cast<T>(2 * kLog2E) + shifter;
  const Vec<T> n = shifted - shifter;
  const Vec<T> r = (x + x - n * ln2_high) - n * ln2_low;
  Vec<T> p = splat(inverse_factorial[last]);
  for (int k = last - 1; k >= 1; --k) p = p * r + inverse_factorial[k];
  const Vec<T> near = p * r * r + r;
  const Vec<Integer> bits = ((Vec<Integer>)shifted << (single ? 23 : 52)) +
                            (single ? Integer{0x3f800000} : static_cast<Integer>(int64_t{0x3ff} << 52));
  const Vec<T> power = (Vec<T>)bits;
  *e = power * near + power;
  *e_minus_1 = power * near + (power - T(1));
}

// The sizes of a panel of keys and what packs rows into it.  Lanes are keys.
template <class T>
struct AdditivePanels {
  static constexpr i64 kLane = kLanes<T>;
  static constexpr i64 kVectorsInPanel = 4;
  static constexpr i64 kWidth = kVectorsInPanel * kLane;

  i64 dim, padded_dim;  // D, and D in whole vectors

  explicit AdditivePanels(i64 head_dim) : dim(head_dim), padded_dim(round_up(larger(head_dim, i64{1}), kLane)) {}

  // Per panel [e^(2k) - 1: padded_dim x kWidth] [e^(2k): ...] and, for the exact way, [k: ...].
  i64 table() const { return padded_dim * kWidth; }
  i64 panel() const { return 3 * table(); }

  // Infinity as the largest number there is: beside it every finite key or query saturates, and inf - inf is 0.
  static FASTATTN_INLINE void limit(T* row, i64 n) {
    constexpr T most = sizeof(T) == 4 ? static_cast<T>(__FLT_MAX__) : static_cast<T>(__DBL_MAX__);
    for (i64 d = 0; d < n; ++d) row[d] = row[d] > most ? most : row[d] < -most ? -most : row[d];
  }

  // A row as numbers, padded with zeros to whole vectors; false where it holds a NaN.  With `forget`, a NaN becomes
  // zero: the backward, where every row that sees one has statistics that say so.
  bool load_numbers(const RowSource<T>& source, i64 row, bool forget, T* out) const {
    source.load(row, out);
    for (i64 d = dim; d < padded_dim; ++d) out[d] = 0;
    limit(out, dim);
    bool numbers = true;
    for (i64 d = 0; d < dim; ++d) numbers &= out[d] == out[d];
    if (forget && !numbers)
      for (i64 d = 0; d < dim; ++d) out[d] = out[d] == out[d] ? out[d] : T(0);
    return numbers || forget;
  }

  // Rows [first, first + rows) as one panel, zeros beyond them.  staging: kLane rows of padded_dim.  Returns whether
  // all of it is within reach.
  bool pack(const RowSource<T>& source, i64 first, i64 rows, bool forget, T* staging, T* panel) const {
    const Vec<T> reach = splat(kReach<T>);
    bool within = true;
    for (i64 j = 0; j < kWidth; j += kLane) {
      for (i64 l = 0; l < kLane; ++l) {
        if (j + l < rows)
          within &= load_numbers(source, first + j + l, forget, staging + l * padded_dim);
        else
          std::memset(staging + l * padded_dim, 0, padded_dim * sizeof(T));
      }
      Vec<T> most = {};
      for (i64 d = 0; d < padded_dim; d += kLane) {
        Vec<T> v[kLane];
#pragma GCC unroll 16
        for (int l = 0; l < kLane; ++l) v[l] = load(staging + l * padded_dim + d);
        transpose<T>(v);
        for (int l = 0; l < kLane; ++l) {
          const Vec<T> x = v[l];
          most = vmax(x < T(0) ? -x : x, most);
          Vec<T> e, e_minus_1;
          exponentials<T>(x > reach ? reach : (x < -reach ? -reach : x), &e, &e_minus_1);
          T* const at = panel + (d + l) * kWidth + j;
          store(at, e_minus_1);
          store(at + table(), e);
          store(at + 2 * table(), x);
        }
      }
      within &= reduce_max<T>(most) <= kReach<T>;
    }
    return within;
  }
};

// A query, ready to meet panels: n = table[offset[d] + j] * factor[d] + addend[d].
template <class T>
struct AdditiveQuery {
  T *numbers, *factor, *addend;
  i64* offset;
  bool within;  // reach

  static AdditiveQuery take(Arena& arena, const AdditivePanels<T>& panels) {
    AdditiveQuery q;
    q.numbers = arena.take<T>(panels.padded_dim);
    q.factor = arena.take<T>(panels.padded_dim);
    q.addend = arena.take<T>(panels.padded_dim);
    q.offset = arena.take<i64>(panels.padded_dim);
    q.within = true;
    return q;
  }

  void load_row(const AdditivePanels<T>& panels, const RowSource<T>& source, i64 row, bool forget) {
    const Vec<T> reach = splat(kReach<T>);
    within = panels.load_numbers(source, row, forget, numbers);
    for (i64 d = 0; d < panels.padded_dim; d += kLanes<T>) {
      const Vec<T> x = load(numbers + d);
      Vec<T> e, e_minus_1;
      exponentials<T>(x > reach ? reach : (x < -reach ? -reach : x), &e, &e_minus_1);
      store(factor + d, e);
      store(addend + d, e_minus_1);
    }
    for (i64 d = 0; d < panels.padded_dim; ++d) {
      const T size = numbers[d] < 0 ? -numbers[d] : numbers[d];
      within &= size <= kReach<T>;
      const bool near = size <= kNearZero<T>;
      addend[d] = near ? addend[d] : T(-1);
      offset[d] = d * panels.kWidth + (near ? 0 : panels.table());
    }
  }
};

// The scores of one query against one panel; with kKeep, the tanh of every (d, key) as well, as [D][kWidth].
template <bool kKeep, class T>
inline void additive_scores(const AdditivePanels<T>& panels, const AdditiveQuery<T>& q, const T* weight, const T* panel,
                            bool within, T* scores, T* kept) {
  constexpr i64 n = AdditivePanels<T>::kVectorsInPanel, lane = kLanes<T>, width = AdditivePanels<T>::kWidth;
  Vec<T> sum[n] = {};
  if (within && q.within) {
    for (i64 d = 0; d < panels.dim; ++d) {
      const T* const column = panel + q.offset[d];
#pragma GCC unroll 4
      for (int v = 0; v < n; ++v) {
        const Vec<T> x = load(column + v * lane) * q.factor[d] + q.addend[d];
        const Vec<T> t = x / (x + T(2));
        if constexpr (kKeep) store(kept + d * width + v * lane, t);
        sum[v] += t * weight[d];
      }
    }
  } else {
    const T* const keys = panel + 2 * panels.table();
    for (i64 d = 0; d < panels.dim; ++d)
      for (int v = 0; v < n; ++v) {
        const Vec<T> t = tanh(load(keys + d * width + v * lane) + q.numbers[d]);
        if constexpr (kKeep) store(kept + d * width + v * lane, t);
        sum[v] += t * weight[d];
      }
  }
#pragma GCC unroll 4
  for (int v = 0; v < n; ++v) store(scores + v * lane, sum[v]);
}

// Row (b, h) of the weights (B|1, Hq, D) as dense numbers.
template <class T>
inline void load_weight(const View& weight, i64 b, i64 h, T* out) {
  load_row(weight.dtype, weight.at(b, h), weight.stride[2], weight.size[2], out);
}

}  // namespace fastattn::cpu::FASTATTN_ISA
