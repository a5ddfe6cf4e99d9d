// Scores of one warpgroup's rows: masks and biases, the online softmax, and what becomes of values that are not finite.
#pragma once

#include "../attention/dropout.h"
#include "../attention/row_end.h"
#include "block.h"
#include "row_store.h"

namespace fastattn::cuda {

// The two rows of a lane, of a tile of query rows: 0 is `row`, 1 is row + 8.
struct OwnRows {
  float largest[2], sum[2];  // so far; sums are of this lane's columns
  float rescale[2];          // from before the last tile to after it
};

// The place of this lane's rows in a tile whose rows are packed (attention/scores.h: Place).
struct PackedPlace {
  static constexpr bool kTransposed = false, kPacked = true;
  const Packing& packing;
  int queries[2];  // of OwnRows; a row that is nobody's has a query that does not exist
  int column, batch;
  int head;  // the first that shares the tile

  FASTATTN_DEVICE int query(int, int, int r) const { return r >> 1 ? queries[1] : queries[0]; }
  FASTATTN_DEVICE int key(int, int n, int r) const { return column + 8 * n + (r & 1); }
  // found again where it is needed: a register less, and most calls do not need it
  FASTATTN_DEVICE int head_at(int, int r) const {
    const int row = row_of_lane(r >> 1);
    return head + row - (row * packing.reciprocal >> 16) * packing.heads;
  }
  // of the 64 of a group, 16 to a warp
  static FASTATTN_DEVICE int row_of_lane(int half) {
    const int thread = thread_index_again();
    return (thread >> 1 & 48) + (thread >> 2 & 7) + 8 * half;
  }
};

FASTATTN_DEVICE PackedPlace packed_place(const Attention& p, const Packing& packing, const RowContext& context,
                                         int group) {
  const int thread = thread_index_again();
  const int first = context.first_row + group * packing.queries;  // of this group
  PackedPlace at{packing, {}, 2 * (thread & 3), context.batch, context.head};
  FASTATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int query = PackedPlace::row_of_lane(half) * packing.reciprocal >> 16;
    at.queries[half] = query < packing.queries ? first + query : p.query_length;
  }
  return at;
}

// Calls f(part, first column) for parts of at most 64 columns of a tile of scores, as float (&)[1][columns / 8][4]: a
// part's elements fit the bits of one word.
template <int kFirst = 0, int N, class F>
FASTATTN_DEVICE void in_parts(float (&s)[N], F f) {
  constexpr int kColumns = N / 4 - kFirst < 8 ? N / 4 - kFirst : 8;
  f(*reinterpret_cast<float (*)[1][kColumns][4]>(&s[4 * kFirst]), 8 * kFirst);
  if constexpr (kFirst + kColumns < N / 4) in_parts<kFirst + kColumns>(s, f);
}

// -inf outside [lo, hi) of each row's columns, counted from the column of s[0].
template <int N>
FASTATTN_DEVICE void keep_between(float (&s)[N], const int (&lo)[2], const int (&hi)[2]) {
  FASTATTN_UNROLL
  for (int i = 0; i < N; ++i) {
    const int j = i / 4 * 8 + (i & 1), half = i >> 1 & 1;
    s[i] = j >= lo[half] && j < hi[half] ? s[i] : -infinity();
  }
}

// The interval masks: rows are queries and columns keys, or the other way round.
template <class Place, int N>
FASTATTN_DEVICE void apply_intervals(float (&s)[N], const Attention& p, const Interval& v, const Place& at) {
  int lo[2], hi[2];
  FASTATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    if constexpr (Place::kTransposed) {
      const int key = at.key(0, 0, 2 * half);
      const Range queries = queries_of_keys(p, v, key, key);
      lo[half] = queries.lo;
      hi[half] = queries.hi;
    } else {
      keys_of_query(p, v, at.query(0, 0, 2 * half) + v.offset, lo[half], hi[half]);
    }
    lo[half] -= at.column;
    hi[half] -= at.column;
  }
  keep_between(s, lo, hi);
}

// The place of a part of a tile, from in_parts.
template <class Place>
FASTATTN_DEVICE Place part_of(Place at, int first) {
  at.column += first;
  return at;
}

// Whether an instance has the stages between scale and masks.
template <class Config>
inline constexpr bool kHasBiases = !Config::kPlain;
template <class Config>
  requires requires { Config::kBiases; }
inline constexpr bool kHasBiases<Config> = Config::kBiases;

// From raw products to scores, -inf where masked.
template <class Config, class Place, int N>
FASTATTN_DEVICE void finish_tile(float (&s)[N], const Attention& p, const Interval& v, const Place& at, Side side,
                                 bool masked, bool slopes = true) {
  if constexpr (!Config::kPlain) {
    const bool elements = masked && masked_by_element(p);
    in_parts(s, [&](auto& part, int first) {
      const Place here = part_of(at, first);
      if constexpr (kHasBiases<Config>) {
        scale_and_cap<Place>(part, p);
        if (slopes && p.slopes.data) add_slopes(part, p, v, here);
        add_biases(part, p, v, here, side);
      }
      if (elements) apply_masks(part, p, v, here);
    });
    if (elements) return;
  }
  if (masked) apply_intervals(s, p, v, at);
}

// The same of the keys n0 ... of a tile of query rows.
template <class Config, class Place, int N>
FASTATTN_DEVICE void finish_keys(float (&s)[N], const Attention& p, const RowContext& context, const Place& at, int n0,
                                 bool masked, bool slopes = true) {
  finish_tile<Config>(s, p, context.interval, part_of(at, n0),
                      side_of(p, context.first, context.last, n0, n0 + Config::kKeys), masked, slopes);
}

// Where all keys of a tile lie on one side of all its queries, a slope is a line over the keys: what a lane's columns
// do not share is one multiplication by a constant for each, and the rest one number for each row, which the caller
// adds.  Lines count from the last column of a lane back, so that they are short where weights are largest: in the
// tiles before a query.  Their constants are integers below 2^8, the rest is a distance (add_slopes: exact below 2^24).
template <int N>
FASTATTN_DEVICE void add_lines(float (&s)[N], float (&shift)[2], SharedAddress slopes, const Interval& v,
                               const PackedPlace& at, bool before) {
  constexpr int kLast = N / 4 * 8 - 7;
  float step[2];
  FASTATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    const float slope = load_shared<float>(slopes + (PackedPlace::row_of_lane(half) & 15) * 4);
    step[half] = before ? slope : -slope;
    shift[half] = step[half] * static_cast<float>(at.column + kLast - (at.query(0, 0, 2 * half) + v.offset));
  }
  FASTATTN_UNROLL
  for (int i = 0; i < N; ++i) s[i] = fmaf(step[i >> 1 & 1], static_cast<float>(i / 4 * 8 + (i & 1) - kLast), s[i]);
}

template <class Config, int N>
FASTATTN_DEVICE void finish_keys(float (&s)[N], const Attention& p, const RowContext& context, int row, int n0,
                                 bool masked) {
  const Place<> at{row, 2 * (lane_index() & 3), context.batch, context.head};
  finish_keys<Config>(s, p, context, at, n0, masked);
}

// Scores become weights relative to the largest so far, times 2^kExponent; `own.rescale` takes what was summed before
// to the same.  kShifted: `shift` is still to be added to this lane's scores of each row.
template <bool kShifted, int kExponent, int N>
FASTATTN_DEVICE void weigh(float (&s)[N], OwnRows& own, const float (&multipliers)[2], const float (&shift)[2]) {
  FASTATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    const float multiplier = multipliers[half];
    float largest = kShifted ? -infinity() : own.largest[half];
    FASTATTN_UNROLL
    for (int i = 2 * half; i < N; i += 4) largest = fmaxf(largest, fmaxf(s[i], s[i + 1]));
    if constexpr (kShifted) largest = fmaxf(own.largest[half], largest + shift[half]);
    largest = quad_max(largest);
    // a row that has seen nothing yet keeps a finite pivot, so that -inf - -inf never happens
    const float pivot = largest == -infinity() ? 0.0f : largest * multiplier;
    own.rescale[half] = exp2_approx(own.largest[half] * multiplier - pivot);
    own.largest[half] = largest;
    float sum = own.sum[half] * own.rescale[half];
    const float base = kExponent == 0 ? -pivot : static_cast<float>(kExponent) - pivot;
    const float rest = kShifted ? fmaf(shift[half], multiplier, base) : base;
    FASTATTN_UNROLL
    for (int i = 2 * half; i < N; i += 4) {
      s[i] = exp2_approx(fmaf(s[i], multiplier, rest));
      s[i + 1] = exp2_approx(fmaf(s[i + 1], multiplier, rest));
      sum += s[i] + s[i + 1];
    }
    own.sum[half] = sum;
  }
}

template <int N>
FASTATTN_DEVICE void drop(float (&s)[N], const Attention& p, const PackedPlace& at, int n0) {
  in_parts(s, [&](auto& part, int first) {
    uint32_t bits[1];
    keep_bits<1, sizeof(part) / sizeof(part[0][0])>(bits, p, part_of(at, n0 + first));
    each(part, [&](float& x, int, int n, int r) { x = has(bits[0], n, r) ? x : 0.0f; });
  });
}

template <class T, int N>
FASTATTN_DEVICE void pack_weights(uint32_t (&packed)[N / 8][4], const float (&s)[N]) {
  FASTATTN_UNROLL
  for (int i = 0; i < N / 2; ++i) packed[i / 4][i % 4] = pack2<T>(s[2 * i], s[2 * i + 1]);
}

// Of 8 bits: keys 2 t, 2 t + 1, 2 t + 8 and 2 t + 9 of 16 in a register (transpose.h), t = lane % 4.
template <int N>
FASTATTN_DEVICE void pack_weights_of_8_bits(uint32_t (&packed)[N / 16][4], const float (&s)[N]) {
  FASTATTN_UNROLL
  for (int i = 0; i < N / 4; ++i) {
    const int at = i / 2 * 8 + i % 2 * 2;
    packed[i / 4][i % 4] = pack4(s[at], s[at + 1], s[at + 4], s[at + 5]);
  }
}

template <int N>
FASTATTN_DEVICE void rescale(float (&acc)[N], const OwnRows& own) {
  FASTATTN_UNROLL
  for (int i = 0; i < N; ++i) acc[i] *= own.rescale[i >> 1 & 1];
}

// acc * rescale + part, of the same rows
template <int N>
FASTATTN_DEVICE void add_rescaled(float (&acc)[N], const float (&part)[N], const float (&rescale)[2]) {
  FASTATTN_UNROLL
  for (int i = 0; i < N; ++i) acc[i] = fmaf(acc[i], rescale[i >> 1 & 1], part[i]);
}

// Rows whose bit is set become NaN, and stay it.
template <int N>
FASTATTN_DEVICE void poison(float (&acc)[N], uint32_t rows) {
  FASTATTN_UNROLL
  for (int i = 0; i < N; ++i) acc[i] = rows >> (i >> 1 & 1) & 1 ? not_a_number() : acc[i];
}

// Which of this lane's rows see a value that is not finite, among the checked ones of a tile (bit `half`).  Rare.
template <class Config>
FASTATTN_DEVICE uint32_t rows_that_see(SharedAddress checks, const Attention& p, const Interval& v,
                                       const PackedPlace& at, int n0) {
  const int b = at.batch;
  uint32_t sees = 0;
  FASTATTN_NO_UNROLL
  for (int column = at.column; column < Config::kKeys; column += 8) {
    FASTATTN_NO_UNROLL
    for (int r = 0; r < 4; ++r) {
      if (load_shared<uint8_t>(checks + 16 + column + (r & 1)) == 0) continue;
      const int i = at.query(0, 0, r), h = at.head_at(0, r), j = n0 + column + (r & 1);
      int lo, hi;
      keys_of_query(p, v, i + v.offset, lo, hi);
      bool seen = j >= lo && j < hi && i < p.query_length;
      if constexpr (!Config::kPlain) {
        if (seen && p.query_ids.data)
          seen = load_constant(p.query_ids.data + b * p.query_ids.batch + i) ==
                 load_constant(p.key_ids.data + b * p.key_ids.batch + j);
        if (seen && p.mask.data)
          seen = load_constant(static_cast<const uint8_t*>(p.mask.data) + b * p.mask.batch + h * p.mask.head +
                               i * p.mask.row + j * p.mask.column) != 0;
        if (kHasBiases<Config> && seen && p.bias.data)
          with_reader(p.bias.data, p.bias_element, [&](auto read) {
            seen = read(b * p.bias.batch + h * p.bias.head + (i * p.bias_row + j * p.bias_column)) != -infinity();
          });
      }
      sees |= static_cast<uint32_t>(seen) << (r >> 1);
    }
  }
  sees |= shuffle_xor(sees, 1);
  return sees | shuffle_xor(sees, 2);
}

}  // namespace fastattn::cuda
