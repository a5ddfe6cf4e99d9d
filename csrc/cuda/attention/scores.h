// From raw products to masked scores: scale -> softcap -> biases -> masks, on the accumulators of a tile.
//
// Forward and backward hold tiles of (query rows, keys) or, transposed, of (keys, query rows); `Place` says which query
// and key an accumulator belongs to.  Each stage is one pass under a branch that is the same for all threads.
#pragma once

#include <cmath>

#include "../features/geometry.h"
#include "products.h"

namespace fastattn::cuda {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
// A finite bias as low as finfo.min would become -inf times log2(e); it counts as a number, so it stops here.
constexpr float kLowestBias = -1e30f;

// Query and key of the accumulators of this lane.  kTransposed: rows are keys, columns are queries.  kPacked: rows are
// (query, head of the group) pairs with the head fastest, for few queries under grouped heads.
template <bool kTransposed_ = false, bool kPacked_ = false>
struct Place {
  static constexpr bool kTransposed = kTransposed_, kPacked = kPacked_;
  int row, column;  // of accumulator [0][0][0]
  int batch, head;  // head of row 0 of the packed rows, or of all
  int pack = 1;     // heads packed together

  FASTATTN_DEVICE int row_at(int band, int r) const { return row + 16 * band + 8 * (r >> 1); }
  FASTATTN_DEVICE int column_at(int n, int r) const { return column + 8 * n + (r & 1); }
  FASTATTN_DEVICE int query(int band, int n, int r) const {
    if constexpr (kTransposed) return column_at(n, r);
    if constexpr (kPacked) return row_at(band, r) / pack;
    return row_at(band, r);
  }
  FASTATTN_DEVICE int key(int band, int n, int r) const {
    if constexpr (kTransposed) return row_at(band, r);
    return column_at(n, r);
  }
  FASTATTN_DEVICE int head_at(int band, int r) const {
    if constexpr (kPacked) return head + row_at(band, r) % pack;
    return head;
  }
};

// 1 - 2 / (e^2x + 1) loses all relative accuracy near 0, where scores live under a large cap: a series there.
FASTATTN_DEVICE float tanh_of(float x) {
  const float e = exp2_approx(fminf(fabsf(x), 10.0f) * (2 * kLog2E));
  const float large = copysignf(1.0f - 2.0f * reciprocal_approx(e + 1.0f), x);
  const float x2 = x * x;
  const float small = x * (1.0f + x2 * (-1.0f / 3 + x2 * (2.0f / 15 + x2 * (-17.0f / 315 + x2 * (62.0f / 2835)))));
  // fminf would have dropped a NaN
  return x != x ? x : fabsf(x) < 0.25f ? small : large;
}

// Calls f with a function that reads one element of a tensor of 32- or 16-bit numbers.
template <class F>
FASTATTN_DEVICE void with_reader(const void* data, Element element, F f) {
  switch (element) {
    case Element::kFloat16:
      return f([=](i64 at) { return unpack1<Half>(load_constant(static_cast<const uint16_t*>(data) + at)); });
    case Element::kBFloat16:
      return f([=](i64 at) { return unpack1<BFloat16>(load_constant(static_cast<const uint16_t*>(data) + at)); });
    default:
      return f([=](i64 at) { return load_constant(static_cast<const float*>(data) + at); });
  }
}

// Applies f(value, band, n, r) to every accumulator, column by column: what f reads per column (an id, a table entry)
// is then needed for a short while only, which is worth tens of registers.
template <int kBands, int kColumns, class F>
FASTATTN_DEVICE void each(float (&s)[kBands][kColumns][4], F f) {
  FASTATTN_UNROLL
  for (int n = 0; n < kColumns; ++n) {
    FASTATTN_UNROLL
    for (int band = 0; band < kBands; ++band) {
      FASTATTN_UNROLL
      for (int r = 0; r < 4; ++r) f(s[band][n][r], band, n, r);
    }
  }
}

// head[band][r / 2] of each row of this lane.
template <int kBands, class Place>
FASTATTN_DEVICE void heads_of(int (&head)[kBands][2], const Place& at) {
  FASTATTN_UNROLL
  for (int band = 0; band < kBands; ++band) {
    FASTATTN_UNROLL
    for (int half = 0; half < 2; ++half) head[band][half] = at.head_at(band, 2 * half);
  }
}

// value[band][r / 2] = f(head) of each row of this lane: one call where all rows have the same head.
template <int kBands, class Place, class F>
FASTATTN_DEVICE void per_head(float (&value)[kBands][2], const Place& at, F f) {
  const float common = Place::kPacked ? 0.0f : f(at.head_at(0, 0));
  FASTATTN_UNROLL
  for (int band = 0; band < kBands; ++band) {
    FASTATTN_UNROLL
    for (int half = 0; half < 2; ++half) value[band][half] = Place::kPacked ? f(at.head_at(band, 2 * half)) : common;
  }
}

template <class Place, int kBands, int kColumns>
FASTATTN_DEVICE void scale_and_cap(float (&s)[kBands][kColumns][4], const Attention& p) {
  if (p.softcap_out != 0.0f) {
    each(s, [&](float& x, int, int, int) { x = tanh_of(x * p.softcap_in) * p.softcap_out; });
  } else if (p.scaled) {
    each(s, [&](float& x, int, int, int) { x *= p.scale_log2; });
  } else if (p.negate) {
    each(s, [&](float& x, int, int, int) { x = -x; });
  }
}

FASTATTN_DEVICE float slope_of(const Attention& p, int b, int head) {
  return load_constant(p.slopes.data + b * p.slopes.batch + head) * p.slope_unit;
}

// Distances are converted once for each row, and are exact below 2^24, as sums of small integers in float32 are; from
// there on they are right to a rounding or two.
template <class Place, int kBands, int kColumns>
FASTATTN_DEVICE void add_slopes(float (&s)[kBands][kColumns][4], const Attention& p, const Interval& v,
                                const Place& at) {
  float slope[kBands][2], first[kBands][2];
  per_head(slope, at, [&](int head) { return slope_of(p, at.batch, head); });
  FASTATTN_UNROLL
  for (int band = 0; band < kBands; ++band) {
    FASTATTN_UNROLL
    for (int half = 0; half < 2; ++half)
      first[band][half] = static_cast<float>(at.key(band, 0, 2 * half) - (at.query(band, 0, 2 * half) + v.offset));
  }
  each(s, [&](float& x, int band, int n, int r) {
    const int further = 8 * n + (r & 1);
    const float distance = first[band][r / 2] + static_cast<float>(at.kTransposed ? -further : further);
    x = fmaf(-slope[band][r / 2], fabsf(distance), x);
  });
}

template <class Place, int kBands, int kColumns>
FASTATTN_DEVICE void add_biases(float (&s)[kBands][kColumns][4], const Attention& p, const Interval& v, const Place& at,
                                Side side) {
  const int b = at.batch;
  if (p.table) {
    const float* table = p.table + b * p.table_batch;
    if (side != Side::kNear) {
      const int column = side == Side::kFarLeft ? 0 : p.table_left + p.table_right;
      float end[kBands][2];
      per_head(end, at, [&](int head) { return load_constant(table + head * p.table_head + column) * kLog2E; });
      each(s, [&](float& x, int band, int, int r) { x += end[band][r / 2]; });
    } else {
      int head[kBands][2];
      heads_of(head, at);
      each(s, [&](float& x, int band, int n, int r) {
        const int distance = at.key(band, n, r) - (at.query(band, n, r) + v.offset);
        const int column = smaller(larger(distance, -p.table_left), p.table_right) + p.table_left;
        x += load_constant(table + head[band][r / 2] * p.table_head + column) * kLog2E;
      });
    }
  }
  if (p.bias.data) {
    // What lies beyond the tensor's end is masked, and read inside it.  64 bits for where batch and head start, 32 from
    // there on: half the registers (the launcher refuses strides that need more).
    int row[kBands][2];
    FASTATTN_UNROLL
    for (int band = 0; band < kBands; ++band) {
      FASTATTN_UNROLL
      for (int half = 0; half < 2; ++half)
        row[band][half] = at.kTransposed ? smaller(at.key(band, 0, 2 * half), p.key_length - 1) * p.bias_column
                                         : smaller(at.query(band, 0, 2 * half), p.query_length - 1) * p.bias_row;
    }
    // packed rows start each in a slice of their own
    const i64 slice = b * p.bias.batch + (at.kPacked ? 0 : at.head_at(0, 0) * p.bias.head);
    i64 start[kBands][2];
    FASTATTN_UNROLL
    for (int band = 0; band < kBands; ++band) {
      FASTATTN_UNROLL
      for (int half = 0; half < 2; ++half)
        start[band][half] = at.kPacked ? slice + at.head_at(band, 2 * half) * p.bias.head + row[band][half] : slice;
    }
    with_reader(p.bias.data, p.bias_element, [&](auto read) {
      each(s, [&](float& x, int band, int n, int r) {
        const int across = at.kTransposed ? smaller(at.query(0, n, r), p.query_length - 1) * p.bias_row
                                          : smaller(at.key(0, n, r), p.key_length - 1) * p.bias_column;
        const float added = read(start[band][r / 2] + (at.kPacked ? across : row[band][r / 2] + across));
        // not fmaxf, which would drop a NaN
        const float raised = added < kLowestBias ? kLowestBias : added;
        x = added == -infinity() ? -infinity() : x + raised * kLog2E;
      });
    });
  }
}

// Distances to columns of row and column tables.  Clamped: nobody has looked at what `columns` holds on a GPU.
template <int kCount>
FASTATTN_DEVICE void find_columns(int (&column)[kCount], const ContentTables& t) {
  FASTATTN_UNROLL
  for (int& x : column) x = smaller(larger(x, -t.left), t.right) + t.left;
  if (!t.columns) return;
  FASTATTN_UNROLL
  for (int& x : column) x = smaller(larger(load_constant(t.columns + x), 0), t.last);
}

// The one column of a tile that lies beyond their reach.
FASTATTN_DEVICE int far_column(const ContentTables& t, Side side) {
  int column[1] = {side == Side::kFarLeft ? -t.left : t.right};
  find_columns(column, t);
  return column[0];
}

// A tile beyond the reach of the tables reads one column.  Others look up eight columns of the tile at a time, in a
// loop that is not unrolled: like the loads of masks, those of a whole tile took the registers that the tile needs.
// Rows and keys beyond the tables' ends are masked, and read inside them.
template <class Place, int kBands, int kColumns>
FASTATTN_DEVICE void add_tables(float (&s)[kBands][kColumns][4], const Attention& p, const Interval& v, const Place& at,
                                Side side) {
  const ContentTables& t = p.content;
  const float* const rows = t.rows + at.batch * t.rows_batch;
  const float* const keys = t.cols + (at.batch * t.cols_batch + at.head / p.group * t.cols_head);
  const auto row_entry = [&](int band, int n, int r, int column) {
    const i64 row = smaller(at.query(band, n, r), p.query_length - 1);
    return load_constant(rows + (at.head_at(band, r) * t.rows_head + row * t.rows_row) + column) * kLog2E;
  };
  const auto column_entry = [&](int band, int n, int r, int column) {
    const int key = smaller(at.key(band, n, r), p.key_length - 1);
    return load_constant(keys + static_cast<i64>(column) * t.cols_column + key) * kLog2E;
  };
  if (side != Side::kNear) {
    const int column = far_column(t, side);
    if (t.rows) each(s, [&](float& x, int band, int n, int r) { x += row_entry(band, n, r, column); });
    if (t.cols) each(s, [&](float& x, int band, int n, int r) { x += column_entry(band, n, r, column); });
    return;
  }
  FASTATTN_NO_UNROLL
  for (int n = 0; n < kColumns; ++n) {
    int column[4 * kBands];
    float added[4 * kBands];
    const auto each_of_n = [&](auto f) {
      FASTATTN_UNROLL
      for (int x = 0; x < 4 * kBands; ++x) f(x, x / 4, x % 4);
    };
    each_of_n([&](int x, int band, int r) { column[x] = at.key(band, n, r) - (at.query(band, n, r) + v.offset); });
    find_columns(column, t);
    each_of_n([&](int x, int, int) { added[x] = 0.0f; });
    if (t.rows) each_of_n([&](int x, int band, int r) { added[x] += row_entry(band, n, r, column[x]); });
    if (t.cols) each_of_n([&](int x, int band, int r) { added[x] += column_entry(band, n, r, column[x]); });
    each(s, [&](float& x, int band, int m, int r) { x += m == n ? added[4 * band + r] : 0.0f; });
  }
}

// Bit 4 * n + r of bits[band]: whether accumulator [band][n][r] may be seen, a dense bias of -inf aside.  A loop that
// is not unrolled, since it touches no accumulator: unrolled, its loads took the registers that the tile needs.
template <class Place, int kBands, int kColumns>
FASTATTN_DEVICE void visible_bits(uint32_t (&bits)[kBands], const Attention& p, const Interval& v, const Place& at) {
  static_assert(kColumns <= 8);
  const i64* query_ids = p.query_ids.data + at.batch * p.query_ids.batch;
  const i64* key_ids = p.key_ids.data + at.batch * p.key_ids.batch;
  const uint8_t* mask = static_cast<const uint8_t*>(p.mask.data) + at.batch * p.mask.batch;
  FASTATTN_UNROLL
  for (int band = 0; band < kBands; ++band) bits[band] = 0;
  FASTATTN_NO_UNROLL
  for (int n = 0; n < kColumns; ++n) {
    FASTATTN_UNROLL
    for (int band = 0; band < kBands; ++band) {
      FASTATTN_UNROLL
      for (int r = 0; r < 4; ++r) {
        const int i = at.query(band, n, r), j = at.key(band, n, r);
        int lo, hi;
        keys_of_query(p, v, i + v.offset, lo, hi);
        bool seen = j >= lo && j < hi && i < p.query_length;
        if (p.query_ids.data && seen) seen = load_constant(query_ids + i) == load_constant(key_ids + j);
        if (p.mask.data && seen)
          seen = load_constant(mask + at.head_at(band, r) * p.mask.head + i * p.mask.row + j * p.mask.column) != 0;
        bits[band] |= static_cast<uint32_t>(seen) << (4 * n + r);
      }
    }
  }
}

// Whether bit 4 * n + r is set.
FASTATTN_DEVICE bool has(uint32_t bits, int n, int r) { return bits >> (4 * n + r) & 1; }

template <class Place, int kBands, int kColumns>
FASTATTN_DEVICE void apply_masks(float (&s)[kBands][kColumns][4], const Attention& p, const Interval& v,
                                 const Place& at) {
  uint32_t bits[kBands];
  visible_bits<Place, kBands, kColumns>(bits, p, v, at);
  each(s, [&](float& x, int band, int n, int r) { x = has(bits[band], n, r) ? x : -infinity(); });
}

// Whether a tile of keys [n0, n1) needs a look at single elements, given what all its queries see.
FASTATTN_DEVICE bool needs_masks(const Range& keys, int n0, int n1) { return n0 < keys.full_lo || n1 > keys.full_hi; }

// Whether a tile may hold places where what lies under the mask must not be met: a bias of -inf masks as well.
FASTATTN_DEVICE bool needs_care(const Attention& p, bool masked) { return masked || p.bias.data; }

// Everything: -inf where masked, which is checked only where `masked` says that it may happen.
template <class Place, int kBands, int kColumns>
FASTATTN_DEVICE void finish_scores(float (&s)[kBands][kColumns][4], const Attention& p, const Interval& v,
                                   const Place& at, bool masked, Sides sides) {
  scale_and_cap<Place>(s, p);
  if (p.slopes.data) add_slopes(s, p, v, at);
  add_biases(s, p, v, at, sides.table);
  if (p.content.rows || p.content.cols) add_tables(s, p, v, at, sides.content);
  if (masked) apply_masks(s, p, v, at);
}

}  // namespace fastattn::cuda
