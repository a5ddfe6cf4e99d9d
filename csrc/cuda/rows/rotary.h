// Rotary embedding of queries and keys in one launch; its backward is the same kernel with the sines negated.
//
// A block holds some tokens of up to four heads, so that cosines and sines are read once for all of them.  A thread
// turns the same few pairs of each head: it reads what it is going to write and nothing else, which makes `to` free to
// be `from`.  Bandwidth is all that counts: all loads of a thread are issued before the first of their results is used.
#pragma once

#include "elements.h"
#include "params.h"

namespace fastattn::cuda {

inline constexpr int kRotaryThreads = 256;
inline constexpr int kRotaryHeads = 4;

// Cosines and sines of the pairs a thread turns.
template <int kPairs>
struct Angles {
  float cos[kPairs], sin[kPairs];
};

template <int kPairs>
FASTATTN_DEVICE void load_angles(float (&values)[kPairs], const RotaryTable& table, int b, i64 row, int pair) {
  const float* at = table.data + b * table.batch + row * table.row;
  if constexpr (kPairs == 1) {
    values[0] = load_constant(at + pair * table.column);
  } else if constexpr (kPairs == 2) {
    const Vec2 raw = load_constant(reinterpret_cast<const Vec2*>(at + pair));
    values[0] = float_of(raw.x[0]);
    values[1] = float_of(raw.x[1]);
  } else {
    FASTATTN_UNROLL
    for (int n = 0; n < kPairs; n += 4) {
      const Vec4 raw = load_constant(reinterpret_cast<const Vec4*>(at + pair + n));
      FASTATTN_UNROLL
      for (int k = 0; k < 4; ++k) values[n + k] = float_of(raw.x[k]);
    }
  }
}

template <int kPairs>
FASTATTN_DEVICE Angles<kPairs> angles(const RotaryParams& p, const RotarySide& side, int b, i64 row, int pair) {
  Angles<kPairs> a;
  load_angles(a.cos, side.cos, b, row, pair);
  load_angles(a.sin, side.sin, b, row, pair);
  FASTATTN_UNROLL
  for (int k = 0; k < kPairs; ++k) a.sin[k] = p.conjugate ? -a.sin[k] : a.sin[k];
  return a;
}

FASTATTN_DEVICE void turn(float& x0, float& x1, float cos, float sin) {
  const float y0 = x0 * cos - x1 * sin;
  x1 = x1 * cos + x0 * sin;
  x0 = y0;
}

// One token of the heads of this block.
template <class T>
struct TokenRows {
  const Stored<T>* from;
  Stored<T>* to;
  i64 from_head, to_head;
  int count;  // heads that exist

  FASTATTN_DEVICE TokenRows(const RotarySide& side, int b, int first, int i) {
    from = static_cast<const Stored<T>*>(side.from.data) + b * side.from.batch + first * side.from.head +
           i * side.from.row;
    to = static_cast<Stored<T>*>(side.to.data) + b * side.to.batch + first * side.to.head + i * side.to.row;
    from_head = side.from.head;
    to_head = side.to.head;
    count = side.heads - first < kRotaryHeads ? side.heads - first : kRotaryHeads;
  }

  // Reads `kVectors` vectors at `at[...]` of each head, changes them as numbers, and writes them.
  template <int kVectors, class F>
  FASTATTN_DEVICE void each_wide(const int (&at)[kVectors], F change) const {
    Vec4 raw[kRotaryHeads][kVectors];
    FASTATTN_UNROLL
    for (int n = 0; n < kRotaryHeads; ++n)
      if (n < count) FASTATTN_UNROLL
    for (int v = 0; v < kVectors; ++v) raw[n][v] = load_wide<T>(from + n * from_head + at[v]);
    FASTATTN_UNROLL
    for (int n = 0; n < kRotaryHeads; ++n)
      if (n < count) {
        float x[kVectors][kWide<T>];
        FASTATTN_UNROLL
        for (int v = 0; v < kVectors; ++v) widen<T>(raw[n][v], x[v]);
        change(x);
        FASTATTN_UNROLL
        for (int v = 0; v < kVectors; ++v) store_wide<T>(to + n * to_head + at[v], narrow<T>(x[v]));
      }
  }

  // The bits of one vector, or of one element, as they are.
  template <class V>
  FASTATTN_DEVICE void copy(int at) const {
    V raw[kRotaryHeads];
    FASTATTN_UNROLL
    for (int n = 0; n < kRotaryHeads; ++n)
      if (n < count) raw[n] = load_global(reinterpret_cast<const V*>(from + n * from_head + at));
    FASTATTN_UNROLL
    for (int n = 0; n < kRotaryHeads; ++n)
      if (n < count) store_global(reinterpret_cast<V*>(to + n * to_head + at), raw[n]);
  }

  // One pair, of elements at0 and at1.
  FASTATTN_DEVICE void turn_pair(int at0, int at1, float cos, float sin) const {
    Stored<T> raw[kRotaryHeads][2];
    FASTATTN_UNROLL
    for (int n = 0; n < kRotaryHeads; ++n)
      if (n < count) {
        raw[n][0] = load_global(from + n * from_head + at0);
        raw[n][1] = load_global(from + n * from_head + at1);
      }
    FASTATTN_UNROLL
    for (int n = 0; n < kRotaryHeads; ++n)
      if (n < count) {
        float x0 = widen<T>(raw[n][0]), x1 = widen<T>(raw[n][1]);
        turn(x0, x1, cos, sin);
        store_global(to + n * to_head + at0, narrow<T>(x0));
        store_global(to + n * to_head + at1, narrow<T>(x1));
      }
  }
};

// A token's row in units: first those that rotate, then the rest.
template <class T>
FASTATTN_DEVICE void rotate_wide(const RotaryParams& p, const RotarySide& side, const TokenRows<T>& rows, int b,
                                 i64 row, int unit) {
  constexpr int kN = kWide<T>;
  if (!p.interleaved && unit * kN < p.half) {
    const Angles<kN> a = angles<kN>(p, side, b, row, unit * kN);
    const int at[2] = {unit * kN, p.half + unit * kN};
    rows.template each_wide<2>(at, [&](float (&x)[2][kN]) {
      FASTATTN_UNROLL
      for (int k = 0; k < kN; ++k) turn(x[0][k], x[1][k], a.cos[k], a.sin[k]);
    });
  } else if (p.interleaved && unit * kN < 2 * p.half) {
    const Angles<kN / 2> a = angles<kN / 2>(p, side, b, row, unit * (kN / 2));
    const int at[1] = {unit * kN};
    rows.template each_wide<1>(at, [&](float (&x)[1][kN]) {
      FASTATTN_UNROLL
      for (int k = 0; k < kN / 2; ++k) turn(x[0][2 * k], x[0][2 * k + 1], a.cos[k], a.sin[k]);
    });
  } else if (p.copy_rest) {
    const int turning = p.interleaved ? 2 * p.half : p.half;
    rows.template copy<Vec4>(2 * p.half + unit * kN - turning);
  }
}

template <class T>
FASTATTN_DEVICE void rotate_narrow(const RotaryParams& p, const RotarySide& side, const TokenRows<T>& rows, int b,
                                   i64 row, int unit) {
  if (unit < p.half) {
    const Angles<1> a = angles<1>(p, side, b, row, unit);
    const int at0 = p.interleaved ? 2 * unit : unit;
    rows.turn_pair(at0, p.interleaved ? at0 + 1 : p.half + unit, a.cos[0], a.sin[0]);
  } else if (p.copy_rest) {
    rows.template copy<Stored<T>>(unit + p.half);
  }
}

template <class T>
FASTATTN_DEVICE void rotary(const RotaryParams& p) {
  const bool second = block_index() >= p.side[0].blocks;
  const RotarySide& side = p.side[second ? 1 : 0];
  const int block = second ? block_index() - p.side[0].blocks : block_index();
  const int first_head = block % side.groups * kRotaryHeads;
  const int first_token = block / side.groups * p.tokens_per_block;
  for (int n = thread_index(); n < p.tokens_per_block * p.units; n += kRotaryThreads) {
    const int token = first_token + n / p.units, unit = n % p.units;
    if (token >= side.tokens) break;
    const int b = token / side.length, i = token % side.length;
    i64 row = i + side.offset;
    if (side.positions)
      row = load_constant(side.positions + b * side.positions_batch + i * side.positions_token);
    else if (side.offsets.data)
      row = i + load_constant(side.offsets.data + b * side.offsets.batch);
    // a position outside the tables is clamped to them, never read past them
    row = row < 0 ? 0 : row < side.table_rows ? row : side.table_rows - 1;
    const TokenRows<T> rows(side, b, first_head, i);
    if (p.wide)
      rotate_wide(p, side, rows, b, row, unit);
    else
      rotate_narrow(p, side, rows, b, row, unit);
  }
}

}  // namespace fastattn::cuda
