// Which keys a query sees: intervals by arithmetic, what ids and dense masks leave of them at either end, and the exact
// answer for a single pair.
#pragma once

#include "convert.h"
#include "vec.h"

namespace fastattn::cpu::FASTATTN_ISA {

struct Interval {
  i64 low, high;  // [low, high)
  bool empty() const { return low >= high; }
};

// The interval masks of one batch element.  Values come from users' tensors: everything is clamped so that no
// arithmetic overflows and no interval leaves [0, key_length).
struct BatchGeometry {
  i64 offset = 0, left = -1, right = -1, keys = 0, prefix = -1;  // negative = no such bound

  BatchGeometry() = default;
  BatchGeometry(const Problem& p, i64 b) {
    constexpr i64 kFar = i64{1} << 60;
    const auto clamp = [](i64 x, i64 low, i64 high) { return larger(low, smaller(x, high)); };
    const auto integer = [&](const View& v) { return *reinterpret_cast<const i64*>(v.at(b)); };
    offset = clamp(p.query_offsets ? integer(p.query_offsets) : p.query_offset, -kFar, kFar);
    left = smaller(p.window_left, kFar);
    right = smaller(p.window_right, kFar);
    keys = p.key_lengths ? clamp(integer(p.key_lengths), 0, p.key_length) : p.key_length;
    prefix = p.prefix_lengths ? clamp(integer(p.prefix_lengths), 0, p.key_length) : -1;
  }

  i64 position(i64 i) const { return i + offset; }

  // Both ends are monotone in i.
  Interval visible(i64 i) const {
    const i64 at = position(i);
    Interval range{0, keys};
    if (left >= 0) range.low = larger(i64{0}, at - left);
    if (right >= 0) range.high = smaller(range.high, at + right + 1);
    if (prefix >= 0) range.high = smaller(range.high, larger(at + 1, prefix));
    range.high = larger(range.high, i64{0});
    range.low = smaller(range.low, range.high);
    return range;
  }
};

// Narrows columns [low, high) of the tile at `origin` to those whose id lies within the range of the rows' ids.
// Documents usually come in runs: whole tiles become empty, and the work is proportional to the visible area.
inline Interval document_columns(const Problem& p, i64 b, i64 first, i64 rows, i64 origin, Interval columns) {
  if (!p.query_ids) return columns;
  const auto id = [&](const View& v, i64 i) { return *reinterpret_cast<const i64*>(v.at(b, i)); };
  i64 least = id(p.query_ids, first), most = least;
  for (i64 i = 1; i < rows; ++i) {
    least = smaller(least, id(p.query_ids, first + i));
    most = larger(most, id(p.query_ids, first + i));
  }
  const auto outside = [&](i64 j) {
    const i64 x = id(p.key_ids, origin + j);
    return x < least || x > most;
  };
  while (columns.low < columns.high && outside(columns.low)) ++columns.low;
  while (columns.low < columns.high && outside(columns.high - 1)) --columns.high;
  return columns;
}

// Consecutive queries of consecutive heads.
struct QueryRows {
  i64 b, head, heads, first, count;

  // Whether holds(head, query) for all of them, as far as `view` tells them apart.
  template <class Holds>
  FASTATTN_INLINE bool all(const View& view, Holds holds) const {
    for (i64 h = head; h < (view.stride[1] ? head + heads : head + 1); ++h)
      for (i64 i = first; i < (view.stride[2] ? first + count : first + 1); ++i)
        if (!holds(h, i)) return false;
    return true;
  }
};

// `found`, within `columns`, and what lies between the first and the last of these that a row of a dense mask or bias
// does not hide.
template <class Bits>
inline Interval extend(Interval found, Interval columns, const Bits* row, i64 stride, Bits hidden) {
  constexpr i64 kBlock = 64;
  const auto hides = [&](i64 j) { return row[j * stride] == hidden; };
  const auto hides_block = [&](i64 j) {
    Bits differs = 0;
    for (i64 k = 0; k < kBlock; ++k) differs |= row[j + k] ^ hidden;
    return differs == 0;
  };
  i64 low = columns.low, high = columns.high;
  if (stride == 1) {
    while (low + kBlock <= found.low && hides_block(low)) low += kBlock;
    while (high - kBlock >= found.high && hides_block(high - kBlock)) high -= kBlock;
  }
  while (low < found.low && hides(low)) ++low;
  while (high > found.high && hides(high - 1)) --high;
  return {low, high};
}

// What a dense mask or bias leaves of the columns of the tile at `origin`: nothing before or after it is seen.
template <class Bits>
inline Interval left_by(const View& dense, Bits hidden, const QueryRows& rows, i64 origin, Interval columns) {
  Interval found{columns.high, columns.low};
  rows.all(dense, [&](i64 h, i64 i) {
    const Bits* const row = reinterpret_cast<const Bits*>(dense.at(rows.b, h, i, origin));
    found = extend(found, columns, row, dense.stride[3], hidden);
    return true;
  });
  return found;
}

// What a mask of intervals lets a query see.
inline Interval own_interval(const Problem& p, i64 b, i64 h, i64 i) {
  const i64* const keys = reinterpret_cast<const i64*>(p.row_intervals.at(b, h, i));
  return {keys[0], keys[1]};
}

// The columns from the first to the last that the intervals of the rows hold.
inline Interval joint_interval(const Problem& p, const QueryRows& rows, i64 origin, Interval columns) {
  i64 low = columns.high, high = columns.low;
  rows.all(p.row_intervals, [&](i64 h, i64 i) {
    const Interval keys = own_interval(p, rows.b, h, i);
    low = smaller(low, keys.low - origin), high = larger(high, keys.high - origin);
    return true;
  });
  return {larger(low, columns.low), smaller(high, columns.high)};
}

// Whether a dense mask lets all of the rows see all of the columns.
inline bool hides_nothing(const View& mask, const QueryRows& rows, i64 origin, Interval columns) {
  const i64 stride = mask.stride[3], count = stride ? columns.high - columns.low : 1;
  return rows.all(mask, [&](i64 h, i64 i) {
    const uint8_t* const row = reinterpret_cast<const uint8_t*>(mask.at(rows.b, h, i, origin + columns.low));
    uint8_t hidden = 0;
    if (stride == 1)
      for (i64 j = 0; j < count; ++j) hidden |= row[j] ? uint8_t{0} : uint8_t{255};
    else
      for (i64 j = 0; j < count && !hidden; ++j) hidden = !row[j * stride];
    return !hidden;
  });
}

// The columns of the tile at `origin`, of `count` keys, that any of the rows sees: no mask lets any of them see one
// before or after.
inline Interval visible_columns(const Problem& p, const BatchGeometry& geometry, const QueryRows& rows, i64 origin,
                                i64 count) {
  Interval columns{larger(geometry.visible(rows.first).low - origin, i64{0}),
                   smaller(geometry.visible(rows.first + rows.count - 1).high - origin, count)};
  if (p.row_intervals && !columns.empty()) columns = joint_interval(p, rows, origin, columns);
  columns = document_columns(p, rows.b, rows.first, rows.count, origin, columns);
  if (p.dense_mask && !columns.empty()) columns = left_by(p.dense_mask, uint8_t{0}, rows, origin, columns);
  if (!p.dense_bias || columns.empty()) return columns;
  switch (p.dense_bias.dtype) {  // minus infinity
    case DType::kFloat32:
      return left_by(p.dense_bias, uint32_t{0xff800000}, rows, origin, columns);
    case DType::kFloat64:
      return left_by(p.dense_bias, uint64_t{0xfff0000000000000}, rows, origin, columns);
    case DType::kBFloat16:
      return left_by(p.dense_bias, uint16_t{0xff80}, rows, origin, columns);
    case DType::kFloat16:
      return left_by(p.dense_bias, uint16_t{0xfc00}, rows, origin, columns);
    default:
      return columns;
  }
}

// Every mask at once, for the rare pairs that are handled one by one (non-finite inputs).
inline bool pair_visible(const Problem& p, const BatchGeometry& geometry, i64 b, i64 h, i64 i, i64 j) {
  const Interval range = geometry.visible(i);
  if (j < range.low || j >= range.high) return false;
  if (p.row_intervals) {
    const Interval own = own_interval(p, b, h, i);
    if (j < own.low || j >= own.high) return false;
  }
  if (p.query_ids &&
      *reinterpret_cast<const i64*>(p.query_ids.at(b, i)) != *reinterpret_cast<const i64*>(p.key_ids.at(b, j)))
    return false;
  if (p.dense_mask && !*p.dense_mask.at(b, h, i, j)) return false;
  return !(p.dense_bias && read_scalar<double>(p.dense_bias, b, h, i, j) == -__builtin_inf());
}

}  // namespace fastattn::cpu::FASTATTN_ISA
