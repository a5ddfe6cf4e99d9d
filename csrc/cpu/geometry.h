// Which keys a query sees: intervals by arithmetic, and the exact answer for a single pair.
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
    // A mask of keys alone is padding more often than not: nobody sees its end.
    const View& mask = p.dense_mask;
    if (mask && mask.size[1] == 1 && mask.size[2] == 1)
      while (keys > 0 && !*mask.at(b, 0, 0, keys - 1)) --keys;
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

// Every mask at once, for the rare pairs that are handled one by one (non-finite inputs).
inline bool pair_visible(const Problem& p, const BatchGeometry& geometry, i64 b, i64 h, i64 i, i64 j) {
  const Interval range = geometry.visible(i);
  if (j < range.low || j >= range.high) return false;
  if (p.query_ids &&
      *reinterpret_cast<const i64*>(p.query_ids.at(b, i)) != *reinterpret_cast<const i64*>(p.key_ids.at(b, j)))
    return false;
  if (p.dense_mask && !*p.dense_mask.at(b, h, i, j)) return false;
  return !(p.dense_bias && read_scalar<double>(p.dense_bias, b, h, i, j) == -__builtin_inf());
}

}  // namespace fastattn::cpu::FASTATTN_ISA
