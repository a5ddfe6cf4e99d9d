// The score pipeline of one row of one tile, shared by forward and backward:
//     scale -> softcap -> + biases -> masks.
// Rows without softcap, and with no bias but slopes, stay in units of q.k ("plain"): the scale is folded into the
// exponent, one fused multiply-add per element.  Masked scores are exactly -inf and nothing else is.
#pragma once

#include "../common/philox.h"
#include "content_tables.h"
#include "geometry.h"
#include "math.h"
#include "pack.h"

namespace fastattn::cpu::FASTATTN_ISA {

// The largest score of [begin, end), lane by lane.
template <class T>
FASTATTN_INLINE Vec<T> row_max_lanes(const T* s, i64 begin, i64 end) {
  Vec<T> a = splat(-kInfinity<T>), b = a;
  i64 j = begin;
  for (; j + 2 * kLanes<T> <= end; j += 2 * kLanes<T>) {
    a = vmax(load(s + j), a);
    b = vmax(load(s + j + kLanes<T>), b);
  }
  if (j < end) a = vmax(load(s + j), a);
  return vmax(a, b);
}

template <class T>
struct Scorer {
  const Problem* problem = nullptr;
  BatchGeometry geometry;
  i64 b = 0, h = 0;
  bool plain = true;
  bool one_bias = false;           // slopes or a table and nothing else but the scale
  bool masked_by_element = false;  // ids, dense mask or dense bias: some keys inside the interval may be hidden
  T scale = 1, cap = 0, slope = 0;
  T factor = 1;  // p = 2^(factor * (s - reference))
  const T* table = nullptr;
  i64 table_stride = 1, table_size = 0, table_left = 0;
  ContentTables<T> content;

  // Slopes are divided by the scale; other biases may hold numbers as large as there are.
  static bool is_plain(const Problem& p) {
    const double least = p.slopes ? 1e-6 : 0;
    return !(p.softcap || p.table || p.dense_bias || p.row_table || p.col_table) && p.scale > least;
  }

  // Whether rows that see all of a tile may have one number added to q.k, or nothing: shares_bias().
  static bool may_share_bias(const Problem& p) {
    return p.scale > 0 && !(p.softcap || p.slopes || p.dense_bias || p.row_table || p.col_table || p.query_ids ||
                            p.dense_mask || p.dropout_p > 0);
  }

  Scorer() = default;
  Scorer(const Problem& p, i64 batch, i64 head)
      : problem(&p), geometry(p, batch), b(batch), h(head), content(p, batch, head) {
    scale = static_cast<T>(p.scale);
    cap = static_cast<T>(p.softcap);
    plain = is_plain(p);
    masked_by_element = p.query_ids || p.dense_mask || p.dense_bias;
    factor = static_cast<T>(plain ? p.scale * kLog2E : kLog2E);
    if (p.slopes) slope = *reinterpret_cast<const T*>(p.slopes.at(b, h)) / (plain ? scale : T(1));
    if (p.table && p.table.size[2] > 0) {
      table = reinterpret_cast<const T*>(p.table.at(b, h));
      table_stride = p.table.stride[2];
      table_size = p.table.size[2];
      table_left = larger(i64{0}, smaller(p.table_left, table_size - 1));
    }
    one_bias = (plain && p.slopes) || (table && !(p.slopes || cap != 0 || p.dense_bias || content));
  }

  bool visible(i64 i, i64 j) const { return pair_visible(*problem, geometry, b, h, i, j); }

  // Columns [begin, end) of the tile whose first column is key `origin`, clipped to those row i may see.
  Interval clip(i64 i, i64 origin, i64 begin, i64 end) const {
    Interval range = geometry.visible(i);
    if (problem->row_intervals) {
      const Interval own = own_interval(*problem, b, h, i);
      range = {larger(range.low, own.low), smaller(range.high, own.high)};
    }
    const i64 low = smaller(larger(range.low - origin, begin), end);
    return {low, larger(low, smaller(range.high - origin, end))};
  }

  // Whether queries i0 to i1 see all of the columns; not asked of ids and dense biases.
  bool sees_all(i64 i0, i64 i1, i64 origin, Interval columns) const {
    if (problem->query_ids || problem->dense_bias || geometry.visible(i1).low > origin + columns.low ||
        geometry.visible(i0).high < origin + columns.high)
      return false;
    const QueryRows rows{b, h, 1, i0, i1 - i0 + 1};
    if (problem->row_intervals)
      return rows.all(problem->row_intervals, [&](i64, i64 i) {
        const Interval own = own_interval(*problem, b, h, i);
        return own.low <= origin + columns.low && own.high >= origin + columns.high;
      });
    return !problem->dense_mask || hides_nothing(problem->dense_mask, rows, origin, columns);
  }

  // Turns q.k in s[begin, end) into masked scores and returns the part that holds any, in whole vectors: what lies
  // outside of it is masked and left as it was.  begin and end are multiples of the vector length; temp has room for
  // a tile row.  With `cap_gradient`, the derivative of the softcap is left there.  With `common`, a row whose keys all
  // have the same bias stays q.k, and the bias is left there; NaN otherwise.
  FASTATTN_INLINE Interval apply(i64 i, i64 origin, i64 begin, i64 end, T* s, T* temp, T* cap_gradient,
                                 T* common = nullptr) const {
    const Interval seen = clip(i, origin, begin, end);
    if (common) *common = static_cast<T>(__builtin_nan(""));
    if (seen.low >= seen.high) return {begin, begin};
    const Interval live{round_down(seen.low, kLanes<T>), round_up(seen.high, kLanes<T>)};
    if (!(common && beyond_table(i, origin, seen, common)) && (!plain || problem->slopes || masked_by_element))
      transform(i, origin, seen, live, s, temp, cap_gradient);
    if (live.low < seen.low) hide_lanes(s + live.low, 0, seen.low - live.low);
    if (seen.high < live.high) hide_lanes(s + live.high - kLanes<T>, seen.high - live.high + kLanes<T>, kLanes<T>);
    return live;
  }

  // Lanes [first, last) of one vector become -inf.
  FASTATTN_INLINE static void hide_lanes(T* s, i64 first, i64 last) {
    const Vec<T> lane = lane_numbers<T>(), hidden = splat(-kInfinity<T>), score = load(s);
    store(s, (lane >= static_cast<T>(first)) & (lane < static_cast<T>(last)) ? hidden : score);
  }

  // The largest of the scores that apply() left in s[live), lane by lane.
  FASTATTN_INLINE Vec<T> largest(const T* s, Interval live, T common) const {
    const Vec<T> top = row_max_lanes(s, live.low, live.high);
    return common == common ? top * scale + common : top;
  }

  // Both where row i sees all of [begin, end).
  FASTATTN_INLINE Vec<T> apply_whole(i64 i, i64 origin, i64 begin, i64 end, T* s, T* temp, T* common) const {
    *common = static_cast<T>(__builtin_nan(""));
    if (one_bias) {  // in one pass
      if (beyond_table(i, origin, {begin, end}, common)) return largest(s, {begin, end}, *common);
      Vec<T> top = splat(-kInfinity<T>);
      const auto keep = [&](i64 j, Vec<T> score) __attribute__((always_inline)) {
        store(s + j, score);
        top = vmax(score, top);
      };
      if (table)
        add_table(i, origin, {begin, end}, s, keep, scale);
      else
        add_slope(i, origin, {begin, end}, s, keep);
      return top;
    }
    score_whole(i, origin, {begin, end}, s, temp, nullptr);
    return row_max_lanes(s, begin, end);
  }

  // apply() where row i sees all of the columns.
  FASTATTN_INLINE void score_whole(i64 i, i64 origin, Interval columns, T* s, T* temp, T* cap_gradient) const {
    if (!plain || problem->slopes) add_all(i, origin, columns, columns, s, temp, cap_gradient);
  }

  // Whether what is added to q.k of queries i0 to i1, which see all of the columns, is one number, if anything.
  bool shares_bias(i64 i0, i64 i1, i64 origin, Interval columns, T* bias) const {
    *bias = 0;
    if (!one_bias) return plain;
    T last;
    return beyond_table(i0, origin, columns, bias) && beyond_table(i1, origin, columns, &last) && *bias == last;
  }

  void transform(i64 i, i64 origin, Interval seen, Interval live, T* s, T* temp, T* cap_gradient) const {
    add_all(i, origin, seen, live, s, temp, cap_gradient);
    if (problem->query_ids) hide_other_documents(i, origin, seen, s);
    if (problem->dense_mask) hide_masked(i, origin, seen, s);
  }

  // Scale, softcap and biases.
  void add_all(i64 i, i64 origin, Interval seen, Interval live, T* s, T* temp, T* cap_gradient) const {
    const auto keep = [=](i64 j, Vec<T> score) { store(s + j, score); };
    if (plain) {
      if (problem->slopes) add_slope(i, origin, live, s, keep);
    } else {
      T by = scale;  // the first bias scales while it adds
      if (cap != 0) {
        soften(live.low, live.high, s, cap_gradient);
        by = 1;
      }
      if (table) add_table(i, origin, live, s, keep, by), by = 1;
      if (content) content.add(i, origin - geometry.position(i), origin, seen, s, by), by = 1;
      if (problem->dense_bias) add_dense(i, origin, seen, s, temp, by), by = 1;
      if (by != 1)
        for (i64 j = live.low; j < live.high; j += kLanes<T>) store(s + j, load(s + j) * by);
      if (problem->slopes) add_slope(i, origin, live, s, keep);
    }
  }

  void soften(i64 begin, i64 end, T* s, T* cap_gradient) const {
    const T inner = static_cast<T>(problem->scale / problem->softcap);
    for (i64 j = begin; j < end; j += kLanes<T>) {
      const Vec<T> t = tanh(load(s + j) * inner);
      store(s + j, t * cap);
      if (cap_gradient) store(cap_gradient + j, T(1) - t * t);
    }
  }

  // Hands the vectors of s[live) with their bias to keep(j, scores).
  template <class Keep>
  FASTATTN_INLINE void add_slope(i64 i, i64 origin, Interval live, const T* s, Keep keep) const {
    constexpr i64 kExact = i64{1} << 23;
    constexpr T n = kLanes<T>;
    const i64 first = origin - geometry.position(i) + live.low, last = first + live.high - live.low;
    const Vec<T> slopes = splat(slope), here = lane_numbers<T>() + static_cast<T>(first);
    const auto add = [&](i64 j, Vec<T> distance)
                         __attribute__((always_inline)) { keep(j, load(s + j) - distance * slopes); };
    if (first <= -kExact || last >= kExact) {
      for (i64 j = live.low; j < live.high; j += kLanes<T>) {
        Vec<T> distance;
        for (int k = 0; k < kLanes<T>; ++k) distance[k] = static_cast<T>(first + (j - live.low) + k);
        add(j, magnitude<T>(distance));
      }
      return;
    }
    // small integers, exact in floating point: after the query, before it, or both
    Vec<T> distance = first >= 0 ? here : -here;
    if (first >= 0)
      for (i64 j = live.low; j < live.high; j += kLanes<T>, distance += n) add(j, distance);
    else if (last <= 0)
      for (i64 j = live.low; j < live.high; j += kLanes<T>, distance -= n) add(j, distance);
    else
      for (i64 j = live.low; j < live.high; j += kLanes<T>, distance -= n) add(j, magnitude<T>(distance));
  }

  // Columns [near.low, near.high) index the table one by one, those before and after use its end values.
  Interval table_span(i64 i, i64 origin, Interval seen, i64* shift) const {
    *shift = origin - geometry.position(i) + table_left;  // column j uses entry j + shift
    const i64 low = larger(seen.low, smaller(-*shift, seen.high));
    return {low, larger(low, smaller(seen.high, table_size - *shift))};
  }

  // Whether a table is the only bias and all that row i sees of a tile lies before or after its inner entries; the
  // bias. Not if it is so large that it would swallow the scores it is added to.  It follows from row and tile alone:
  // other heads that happen to share a strip do not change a result.
  bool beyond_table(i64 i, i64 origin, Interval seen, T* bias) const {
    if (!(table && one_bias && scale > 0) || masked_by_element) return false;
    const i64 shift = origin - geometry.position(i) + table_left;
    const bool before = seen.high - 1 + shift <= 0;
    if (!before && seen.low + shift < table_size - 1) return false;
    const T value = table[before ? 0 : (table_size - 1) * table_stride];
    if (!(value > T(-1e3) && value < T(1e3))) return false;
    *bias = value;
    return true;
  }

  // Whole vectors: all before the table's inner entries, within them, after them, or across one of their ends.
  template <class Keep>
  FASTATTN_INLINE void add_table(i64 i, i64 origin, Interval live, const T* s, Keep keep, T by) const {
    constexpr i64 n = kLanes<T>;
    const i64 size = table_size, shift = origin - geometry.position(i) + table_left;  // column j, entry j + shift
    const T* const entries = table;
    const i64 stride = table_stride;
    const Vec<T> before = splat(entries[0]), after = splat(entries[(size - 1) * stride]), scales = splat(by);
    const auto add = [&](i64 j, Vec<T> bias) __attribute__((always_inline)) { keep(j, load(s + j) * scales + bias); };
    const auto add_across = [&](i64 j) __attribute__((always_inline)) {  // one end or both
      const i64 e = j + shift, first = larger(-e, i64{0});
      const Vec<T> ends = lane_numbers<T>() < static_cast<T>(first) ? before : after;
      add(j, load_lanes(entries + e * stride, stride, first, smaller(size - e, n), ends));
    };
    i64 j = live.low;
    for (; j < live.high && j + shift <= -n; j += n) add(j, before);
    if (j < live.high && j + shift < 0) add_across(j), j += n;
    if (stride == 1)
      for (; j < live.high && j + shift <= size - n; j += n) add(j, load(entries + j + shift));
    for (; j < live.high && j + shift < size; j += n) add_across(j);
    for (; j < live.high; j += n) add(j, after);
  }

  void add_dense(i64 i, i64 origin, Interval seen, T* s, T* temp, T by) const {
    const View& bias = problem->dense_bias;
    const i64 count = seen.high - seen.low;
    if (count <= 0) return;
    const char* source = bias.at(b, h, i, origin + seen.low);
    const T* values = temp;
    constexpr DType own = sizeof(T) == 4 ? DType::kFloat32 : DType::kFloat64;
    if (bias.dtype == own && bias.stride[3] == 1)
      values = reinterpret_cast<const T*>(source);
    else
      load_row(bias.dtype, source, bias.stride[3], count, temp);
    T* row = s + seen.low;
    for (i64 j = 0; j < count; ++j) row[j] = values[j] == -kInfinity<T> ? -kInfinity<T> : row[j] * by + values[j];
  }

  void hide_other_documents(i64 i, i64 origin, Interval seen, T* s) const {
    const i64 mine = *reinterpret_cast<const i64*>(problem->query_ids.at(b, i));
    const i64* ids = reinterpret_cast<const i64*>(problem->key_ids.at(b, origin));
    const i64 stride = problem->key_ids.stride[1];
    if (stride == 1) {
      for (i64 j = seen.low; j < seen.high; ++j) s[j] = ids[j] == mine ? s[j] : -kInfinity<T>;
    } else {
      for (i64 j = seen.low; j < seen.high; ++j) s[j] = ids[j * stride] == mine ? s[j] : -kInfinity<T>;
    }
  }

  void hide_masked(i64 i, i64 origin, Interval seen, T* s) const {
    const uint8_t* mask = reinterpret_cast<const uint8_t*>(problem->dense_mask.at(b, h, i, origin));
    const i64 stride = problem->dense_mask.stride[3];
    if (stride == 1) {
      for (i64 j = seen.low; j < seen.high; ++j) s[j] = mask[j] ? s[j] : -kInfinity<T>;
    } else {
      for (i64 j = seen.low; j < seen.high; ++j) s[j] = mask[j * stride] ? s[j] : -kInfinity<T>;
    }
  }

  // out[j] = 0 or 1 / (1 - p) for the columns [begin, end) and those that share a draw with them; origin is a
  // multiple of four.
  void dropout_factors(i64 i, i64 origin, i64 begin, i64 end, T* out) const {
    const double p = problem->dropout_p;
    const uint32_t threshold = p < 1 ? static_cast<uint32_t>(p * 4294967296.0) : 0;
    const T kept = p < 1 ? static_cast<T>(1 / (1 - p)) : T(0);
    const uint32_t row = static_cast<uint32_t>(i);
    const uint32_t head = static_cast<uint32_t>(b * problem->query_heads + h);
    uint64_t keys[20];
    for (int round = 0; round < 10; ++round) {
      keys[2 * round] = static_cast<uint32_t>(problem->dropout_seed) + round * 0x9E3779B9u;
      keys[2 * round + 1] = static_cast<uint32_t>(problem->dropout_seed >> 32) + round * 0xBB67AE85u;
    }
    uint32_t words[kDraw];
    i64 j = round_down(begin, 4);
    for (; j < end; j += kDraw) {
      const uint32_t first = static_cast<uint32_t>((origin + j) >> 2);
      draw(keys, first, row, head, problem->dropout_offset, words);
      const i64 count = smaller(kDraw, end - j);
      if (count == kDraw)
        for (i64 k = 0; k < kDraw; ++k) out[j + k] = words[k] >= threshold ? kept : T(0);
      else
        for (i64 k = 0; k < count; ++k) out[j + k] = words[k] >= threshold ? kept : T(0);
    }
  }

  static constexpr i64 kDraw = 4 * kLanes<uint64_t>;  // words of one vector of Philox counters

  // philox4x32_10 of common/philox.h for consecutive first counters, each in the low half of a 64-bit element: the
  // multiplication reads low halves alone, so what is left in the high ones does not matter.
  FASTATTN_INLINE static void draw(const uint64_t* keys, uint32_t first, uint32_t row, uint32_t head, uint32_t last,
                                   uint32_t* words) {
    using V = Vec<uint64_t>;
    V c0, c1 = splat(uint64_t{row}), c2 = splat(uint64_t{head}), c3 = splat(uint64_t{last});
    for (int k = 0; k < kLanes<uint64_t>; ++k) c0[k] = first + static_cast<uint32_t>(k);
    const V m0 = splat(uint64_t{0xD2511F53u}), m1 = splat(uint64_t{0xCD9E8D57u});
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const V p0 = multiply_low_halves(c0, m0), p1 = multiply_low_halves(c2, m1);
      c0 = (p1 >> 32) ^ c1 ^ keys[2 * round];
      c2 = (p0 >> 32) ^ c3 ^ keys[2 * round + 1];
      c1 = p1;
      c3 = p0;
    }
    const V low = (c0 & 0xffffffffu) | c1 << 32, high = (c2 & 0xffffffffu) | c3 << 32;
    uint64_t pairs[2 * kLanes<uint64_t>];
    interleave<uint64_t>(low, high, pairs, pairs + kLanes<uint64_t>);
    std::memcpy(words, pairs, sizeof pairs);
  }
};

template <class T>
inline T row_max(const T* s, i64 begin, i64 end) {
  return reduce_max<T>(row_max_lanes(s, begin, end));
}

// The exponent of the softmax, x in 2^x: fused for plain rows, in two steps otherwise (finfo.min * log2(e) would be
// -inf, so the difference comes first).
template <bool kPlain, class T>
FASTATTN_INLINE Vec<T> exponent(Vec<T> s, T reference, T factor) {
  if constexpr (kPlain) return s * factor - reference * factor;
  return (s - reference) * factor;
}

// p = 2^(factor * (s - reference)) over [begin, end) as numbers, in place; returns their sum, lane by lane.
template <bool kPlain, int kDegree, class T>
inline Vec<T> row_exp(T* s, i64 begin, i64 end, T reference, T factor) {
  Vec<T> sum = {};
  for (i64 j = begin; j < end; j += kLanes<T>) {
    const Vec<T> p = exp2<kDegree>(exponent<kPlain>(load(s + j), reference, factor));
    sum += p;
    store(s + j, p);
  }
  return sum;
}

#if defined(FASTATTN_BF16_OPERANDS)
// The same, straight into an operand row, whose pieces are `apart` elements from each other; the largest score as well,
// lane by lane, if `top` is given.
template <bool kPlain, class Mode>
FASTATTN_INLINE Vec<float> row_exp_operand(const float* s, i64 begin, i64 end, float reference, float factor, bf16* out,
                                           i64 apart, Vec<float>* top = nullptr) {
  if (top) *top = splat(-kInfinity<float>);
  const auto weight = [=](i64 j) __attribute__((always_inline)) {
    const Vec<float> score = load(s + j);
    if (top) *top = vmax(score, *top);
    return exp2<Mode::kExpDegree>(exponent<kPlain>(score, reference, factor));
  };
  Vec<float> sum = {}, odd = {};
  i64 j = begin;
  for (; j + 32 <= end; j += 32) {
    const Vec<float> p = weight(j), q = weight(j + 16);
    sum += p, odd += q;
    store_pieces<Mode::kPieces>(p, q, out + j, apart);
  }
  if (j < end) {
    const Vec<float> p = weight(j);
    sum += p;
    store_pieces<Mode::kPieces>(p, out + j, apart);
  }
  return sum + odd;
}
#endif

}  // namespace fastattn::cpu::FASTATTN_ISA
