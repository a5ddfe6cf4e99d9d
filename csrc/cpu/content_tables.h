// Biases read from tables of a query's and of a key's own, at a column that follows from their distance:
//     s[i][j] += row_table[i][c] + col_table[c][j],   c = columns[clamp(j - position(i)) + left].
// Keys beyond the reach of `columns` share its first or last entry, so that most of a long row is one number, or one
// stretch of col_table, added in whole vectors; the others look their column up one by one.
#pragma once

#include "geometry.h"
#include "vec.h"

namespace fastattn::cpu::FASTATTN_ISA {

template <class T>
inline T sum_of(const T* x, i64 low, i64 high) {
  if (low >= high) return 0;
  Vec<T> sum = {};
  i64 j = low;
  for (; j + kLanes<T> <= high; j += kLanes<T>) sum += load(x + j);
  T total = reduce_add<T>(sum);
  for (; j < high; ++j) total += x[j];
  return total;
}

template <class T>
class ContentTables {
 public:
  ContentTables() = default;
  ContentTables(const Problem& p, i64 b, i64 h) : entries(p.column_entries()) {
    if (p.row_table) rows = reinterpret_cast<const T*>(p.row_table.at(b, h)), row_stride = p.row_table.stride[2];
    if (p.col_table) cols = reinterpret_cast<const T*>(p.col_table.at(b, h / p.group())), width = p.col_table.stride[2];
    if (p.columns) columns = reinterpret_cast<const int32_t*>(p.columns.data);
    if (entries > 0) left = larger(i64{0}, smaller(p.columns_left, entries - 1));
  }

  explicit operator bool() const { return rows || cols; }

  // s = s * by + bias for the columns `seen` of the tile at key `origin`; `first` is the distance of column 0.
  void add(i64 i, i64 first, i64 origin, Interval seen, T* s, T by) const {
    const i64 shift = first + left;
    if (rows) {
      const T* const row = rows + i * row_stride;
      add_row(row, shift, seen, s, by);
      by = 1;
    }
    if (cols) add_column(cols + origin, shift, seen, s, by);
  }

  // Adds dS of one row of the tile to the gradients of that row of row_table and of col_table (C, keys), where wanted.
  void add_gradient(i64 first, i64 origin, Interval seen, const T* ds, T* drow, T* dcol, i64 keys) const {
    const i64 shift = first + left;
    const Interval near = span(shift, seen);
    const i64 before = column(0), after = column(entries - 1);
    if (drow) {
      drow[before] += sum_of(ds, seen.low, near.low);
      if (columns)
        for (i64 j = near.low; j < near.high; ++j) drow[columns[j + shift]] += ds[j];
      else
        for (i64 j = near.low; j < near.high; ++j) drow[j + shift] += ds[j];
      drow[after] += sum_of(ds, near.high, seen.high);
    }
    if (dcol) {
      T* const sum = dcol + origin;
      for (i64 j = seen.low; j < near.low; ++j) sum[before * keys + j] += ds[j];
      if (columns)
        for (i64 j = near.low; j < near.high; ++j) sum[columns[j + shift] * keys + j] += ds[j];
      else
        for (i64 j = near.low; j < near.high; ++j) sum[(j + shift) * keys + j] += ds[j];
      for (i64 j = near.high; j < seen.high; ++j) sum[after * keys + j] += ds[j];
    }
  }

 private:
  const T *rows = nullptr, *cols = nullptr;  // (Sq, C) and (C, Sk) of this head
  i64 row_stride = 0, width = 0;
  const int32_t* columns = nullptr;
  i64 entries = 0, left = 0;

  i64 column(i64 entry) const { return columns ? columns[entry] : entry; }

  // The columns of the tile that have an entry of their own: column j reads entry j + shift.
  Interval span(i64 shift, Interval seen) const {
    const i64 low = larger(seen.low, smaller(-shift, seen.high));
    return {low, larger(low, smaller(seen.high, entries - shift))};
  }

  void add_row(const T* row, i64 shift, Interval seen, T* s, T by) const {
    const Interval near = span(shift, seen);
    const T before = row[column(0)], after = row[column(entries - 1)];
    for (i64 j = seen.low; j < near.low; ++j) s[j] = s[j] * by + before;
    if (columns)
#pragma GCC ivdep  // s is scratch: without being told so, no gather
      for (i64 j = near.low; j < near.high; ++j) s[j] = s[j] * by + row[columns[j + shift]];
    else
      for (i64 j = near.low; j < near.high; ++j) s[j] = s[j] * by + row[j + shift];
    for (i64 j = near.high; j < seen.high; ++j) s[j] = s[j] * by + after;
  }

  void add_column(const T* col, i64 shift, Interval seen, T* s, T by) const {
    const Interval near = span(shift, seen);
    const T *const before = col + column(0) * width, *const after = col + column(entries - 1) * width;
    for (i64 j = seen.low; j < near.low; ++j) s[j] = s[j] * by + before[j];
    if (columns)
#pragma GCC ivdep
      for (i64 j = near.low; j < near.high; ++j) s[j] = s[j] * by + col[columns[j + shift] * width + j];
    else
#pragma GCC ivdep
      for (i64 j = near.low; j < near.high; ++j) s[j] = s[j] * by + col[(j + shift) * width + j];
    for (i64 j = near.high; j < seen.high; ++j) s[j] = s[j] * by + after[j];
  }
};

}  // namespace fastattn::cpu::FASTATTN_ISA
