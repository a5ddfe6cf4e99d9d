// Which keys a query sees, and which queries a key, by arithmetic: causal and windowed masks, key lengths, prefixes.
#pragma once

#include "../arch/arch.h"
#include "params.h"

namespace fastattn::cuda {

// Offsets, windows and lengths stay within +-2^29, so that sums and differences of three of them fit.
constexpr int kFarthest = 1 << 29;

FASTATTN_DEVICE int smaller(int a, int b) { return a < b ? a : b; }
FASTATTN_DEVICE int larger(int a, int b) { return a > b ? a : b; }

FASTATTN_DEVICE int clamped(i64 x, int low, int high) { return x < low ? low : x > high ? high : static_cast<int>(x); }

// What the interval masks need of one batch.
struct Interval {
  int offset;  // position of query 0 among the keys
  int limit;   // one past the last key anyone may see
  int prefix;  // keys before it are seen by all; -1 without prefix
};

FASTATTN_DEVICE Interval interval_of(const Attention& p, int b) {
  Interval v{p.query_offset, p.key_length, -1};
  if (p.query_offsets.data)
    v.offset = clamped(load_constant(p.query_offsets.data + b * p.query_offsets.batch), -kFarthest, kFarthest);
  if (p.key_lengths.data) v.limit = clamped(load_constant(p.key_lengths.data + b * p.key_lengths.batch), 0, v.limit);
  if (p.prefix_lengths.data)
    v.prefix = clamped(load_constant(p.prefix_lengths.data + b * p.prefix_lengths.batch), 0, kFarthest);
  return v;
}

// [lo, hi) holds everything that one of a range sees; [full_lo, full_hi) only what all of them see.
struct Range {
  int lo, hi, full_lo, full_hi;
};

// Keys of the queries at positions first ... last.
FASTATTN_DEVICE Range keys_of_queries(const Attention& p, const Interval& v, int first, int last) {
  Range r{0, v.limit, 0, v.limit};
  if (p.window_left >= 0) {
    r.lo = larger(r.lo, first - p.window_left);
    r.full_lo = larger(r.full_lo, last - p.window_left);
  }
  if (p.window_right >= 0) {
    r.hi = smaller(r.hi, last + p.window_right + 1);
    r.full_hi = smaller(r.full_hi, first + p.window_right + 1);
  }
  if (v.prefix >= 0) {
    r.hi = smaller(r.hi, larger(last + 1, v.prefix));
    r.full_hi = smaller(r.full_hi, larger(first + 1, v.prefix));
  }
  return r;
}

// Query rows of the keys first ... last.
FASTATTN_DEVICE Range queries_of_keys(const Attention& p, const Interval& v, int first, int last) {
  Range r{0, p.query_length, 0, p.query_length};
  if (p.window_left >= 0) {
    r.hi = smaller(r.hi, last + p.window_left - v.offset + 1);
    r.full_hi = smaller(r.full_hi, first + p.window_left - v.offset + 1);
  }
  if (p.window_right >= 0) {
    r.lo = larger(r.lo, first - p.window_right - v.offset);
    r.full_lo = larger(r.full_lo, last - p.window_right - v.offset);
  }
  if (v.prefix >= 0) {
    if (first >= v.prefix) r.lo = larger(r.lo, first - v.offset);
    if (last >= v.prefix) r.full_lo = larger(r.full_lo, last - v.offset);
  }
  if (first >= v.limit) r.hi = 0;
  if (last >= v.limit) r.full_hi = 0;
  return r;
}

// What rows of two ranges see.
FASTATTN_DEVICE Range joined(const Range& a, const Range& b) {
  return {smaller(a.lo, b.lo), larger(a.hi, b.hi), larger(a.full_lo, b.full_lo), smaller(a.full_hi, b.full_hi)};
}

// Whether there are masks that only a look at each element tells.
FASTATTN_DEVICE bool masked_by_element(const Attention& p) { return p.query_ids.data || p.mask.data; }

// Ranges of the rows first ... last of heads h ... h + heads - 1, as far as ids and masks go.  Without spans nothing is
// known to be seen by all.
FASTATTN_DEVICE void narrow(Range& r, const Attention& p, const Spans& spans, int b, int h, int heads, int first,
                            int last) {
  if (!masked_by_element(p)) return;
  if (!spans.data) {
    r.full_lo = kFarthest;
    r.full_hi = 0;
    return;
  }
  constexpr int kAtOnce = 2;  // loads under way (registers bound them); what is read twice changes nothing
  const int end = last / kSpanRows;
  Range all{kFarthest, 0, 0, kFarthest};
  FASTATTN_NO_UNROLL
  for (int n = 0; n < (spans.head ? heads : 1); ++n) {
    const Vec4* const at = reinterpret_cast<const Vec4*>(spans.data + b * spans.batch + (h + n) * spans.head);
    FASTATTN_NO_UNROLL
    for (int block = first / kSpanRows; block <= end; block += kAtOnce) {
      Vec4 span[kAtOnce];
      FASTATTN_UNROLL
      for (int x = 0; x < kAtOnce; ++x) span[x] = load_constant(at + smaller(block + x, end));
      FASTATTN_UNROLL
      for (int x = 0; x < kAtOnce; ++x) all = joined(all, __builtin_bit_cast(Range, span[x]));
    }
  }
  r.lo = larger(r.lo, all.lo);
  r.hi = smaller(r.hi, all.hi);
  r.full_lo = larger(r.full_lo, all.full_lo);
  r.full_hi = smaller(r.full_hi, all.full_hi);
}

// Keys [lo, hi) of one query, at `position`.
FASTATTN_DEVICE void keys_of_query(const Attention& p, const Interval& v, int position, int& lo, int& hi) {
  lo = p.window_left >= 0 ? position - p.window_left : 0;
  hi = v.limit;
  if (p.window_right >= 0) hi = smaller(hi, position + p.window_right + 1);
  if (v.prefix >= 0) hi = smaller(hi, larger(position + 1, v.prefix));
}

// What a tile of query rows knows of itself: the same for all threads and needed for a short while only, so it waits in
// shared memory and leaves the registers to the accumulators.
struct RowContext {
  Interval interval;
  Range keys;       // of all its rows
  int first, last;  // positions of its rows
  int batch, head;
  int first_row;
};

inline constexpr int kContextBytes = sizeof(RowContext);
static_assert(kContextBytes == 48);

// Of query rows of heads h ... h + heads - 1.  kPlain: ids and masks are not there.
template <bool kPlain = false>
FASTATTN_DEVICE RowContext row_context(const Attention& p, int b, int h, int heads, int first_row, int last_row) {
  RowContext context{};
  last_row = smaller(last_row, p.query_length - 1);
  context.interval = interval_of(p, b);
  context.first = first_row + context.interval.offset;
  context.last = last_row + context.interval.offset;
  context.keys = keys_of_queries(p, context.interval, context.first, context.last);
  if constexpr (!kPlain) narrow(context.keys, p, p.key_spans, b, h, heads, first_row, last_row);
  context.batch = b;
  context.head = h;
  context.first_row = first_row;
  return context;
}

FASTATTN_DEVICE void store_context(SharedAddress at, const RowContext& context) {
  struct Parts {
    Vec4 part[3];
  };
  const Parts parts = __builtin_bit_cast(Parts, context);
  FASTATTN_UNROLL
  for (int n = 0; n < 3; ++n) store_shared(at + 16 * n, parts.part[n]);
}

FASTATTN_DEVICE RowContext load_context(SharedAddress at) {
  struct Parts {
    Vec4 part[3];
  } parts;
  FASTATTN_UNROLL
  for (int n = 0; n < 3; ++n) parts.part[n] = load_shared<Vec4>(at + 16 * n);
  return __builtin_bit_cast(RowContext, parts);
}

// Where a tile of keys n0 ... n1 - 1 lies relative to the distances -left ... right, seen from positions first ...
// last.  Each bound is read where it is asked for: both before it took registers from a kernel of sm_90a.
enum class Side { kNear, kFarLeft, kFarRight };

FASTATTN_DEVICE Side side_of(const int& left, const int& right, int first, int last, int n0, int n1) {
  if (n1 - 1 - first <= -left) return Side::kFarLeft;
  if (n0 - last >= right) return Side::kFarRight;
  return Side::kNear;
}

// Relative to the reach of the distance table.
FASTATTN_DEVICE Side side_of(const Attention& p, int first, int last, int n0, int n1) {
  return side_of(p.table_left, p.table_right, first, last, n0, n1);
}

// Relative to that of the distance table, and of row and column tables.
struct Sides {
  Side table, content;
};

FASTATTN_DEVICE Sides sides_of(const Attention& p, int first, int last, int n0, int n1) {
  return {side_of(p, first, last, n0, n1), side_of(p.content.left, p.content.right, first, last, n0, n1)};
}

}  // namespace fastattn::cuda
