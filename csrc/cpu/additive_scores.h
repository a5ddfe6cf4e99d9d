// Additive scores (Bahdanau et al., 2015): s_ij = sum_d w_d tanh(q_id + k_jd), panel by panel, and nothing of size
// (Sq, Sk, D) anywhere.
//
// One tanh per (i, j, d) would be all of the time, so it is taken apart: with a = e^(2q) and b = e^(2k), which are made
// once per row, n = e^(2(q + k)) - 1 is one multiply-add and tanh(q + k) = n / (n + 2) one addition and one division.
// For |q_d| <= 1/4, n = (a - 1) + a (b - 1) is accurate near zero; beyond it, n = a b - 1 is.
//
// Error, the worst of 10^6 pairs of each magnitude from 1e-6 to 20: 3.4e-7 min(1, |q| + |k|) in float32, 6.4e-16 in
// float64 (the C library's tanh(q + k): 2.1e-7 and 4.0e-16).  n = a b - 1 everywhere would have 6e-8 whatever q and k
// are, and no correct digit at 1e-6.  Time per element on one core (Zen): AVX-512 0.105 ns, against 0.39 ns for
// tanh(q + k) of math.h; AVX2 0.107 and 0.60 ns; SSE2 0.22 and 2.3 ns.  A hardware reciprocal with a Newton step in
// place of the division gains nothing.
//
// A key is clamped to kKeyReach, which changes nothing for |q| <= kQueryReach: tanh has saturated.  A query beyond
// that, or one with a NaN, takes tanh(q + k) itself: a property of the query alone, so that no bit depends on masked
// keys.
#pragma once

#include "arena.h"
#include "scores.h"

namespace fastattn::cpu::FASTATTN_ISA {

// e^(2 (kQueryReach + kKeyReach)) is finite, and tanh(kKeyReach - kQueryReach) rounds to 1.
template <class T>
constexpr T kQueryReach = sizeof(T) == 4 ? T(16) : T(150);
template <class T>
constexpr T kKeyReach = sizeof(T) == 4 ? T(26) : T(170);
template <class T>
constexpr T kNearZero = T(0.25);

// e^(2x) and e^(2x) - 1, x clamped to kKeyReach, each to about one unit in the last place: Taylor series of e^r - 1 on
// |r| <= ln(2) / 2, r = 2x - n ln(2) with ln(2) in two parts.  NaN for NaN.
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
  constexpr T reach = kKeyReach<T>;
  x = x > reach ? splat(reach) : (x < -reach ? splat(-reach) : x);
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

  // Rows [first, first + rows) as one panel, zeros beyond them.  staging: kLane rows of padded_dim.
  void pack(const RowSource<T>& source, i64 first, i64 rows, bool forget, T* staging, T* panel) const {
    for (i64 j = 0; j < kWidth; j += kLane) {
      for (i64 l = 0; l < kLane; ++l) {
        if (j + l < rows)
          load_numbers(source, first + j + l, forget, staging + l * padded_dim);
        else
          std::memset(staging + l * padded_dim, 0, padded_dim * sizeof(T));
      }
      for (i64 d = 0; d < padded_dim; d += kLane) {
        Vec<T> v[kLane];
#pragma GCC unroll 16
        for (int l = 0; l < kLane; ++l) v[l] = load(staging + l * padded_dim + d);
        transpose<T>(v);
        for (int l = 0; l < kLane; ++l) {
          Vec<T> e, e_minus_1;
          exponentials<T>(v[l], &e, &e_minus_1);
          T* const at = panel + (d + l) * kWidth + j;
          store(at, e_minus_1);
          store(at + table(), e);
          store(at + 2 * table(), v[l]);
        }
      }
    }
  }
};

// A query, ready to meet panels: n = table[offset[d] + j] * factor[d] + addend[d].
template <class T>
struct AdditiveQuery {
  T *numbers, *factor, *addend;
  i64* offset;
  bool within;  // kQueryReach

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
    within = panels.load_numbers(source, row, forget, numbers);
    for (i64 d = 0; d < panels.padded_dim; d += kLanes<T>) {
      Vec<T> e, e_minus_1;
      exponentials<T>(load(numbers + d), &e, &e_minus_1);
      store(factor + d, e);
      store(addend + d, e_minus_1);
    }
    for (i64 d = 0; d < panels.padded_dim; ++d) {
      const T size = numbers[d] < 0 ? -numbers[d] : numbers[d];
      within &= size <= kQueryReach<T>;
      const bool near = size <= kNearZero<T>;
      addend[d] = near ? addend[d] : T(-1);
      offset[d] = d * panels.kWidth + (near ? 0 : panels.table());
    }
  }
};

// The scores of one query against one panel; with kKeep, the tanh of every (d, key) as well, as [D][kWidth].
template <bool kKeep, class T>
inline void additive_scores(const AdditivePanels<T>& panels, const AdditiveQuery<T>& q, const T* weight, const T* panel,
                            T* scores, T* kept) {
  constexpr i64 n = AdditivePanels<T>::kVectorsInPanel, lane = kLanes<T>, width = AdditivePanels<T>::kWidth;
  Vec<T> sum[n] = {};
  if (q.within) {
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
