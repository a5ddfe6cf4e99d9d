// Rotary embedding of queries and keys in one go; its backward is the same with the sines negated.
#pragma once

#include "../common/rows.h"
#include "arena.h"
#include "convert.h"
#include "vec.h"

namespace fastattn::cpu::FASTATTN_ISA {

template <class T>
class Rotate {
 public:
  explicit Rotate(const Rotation& rotation) : r(rotation), blocks(ceil_div(r.from[0].size[2], kTokens)) {}

  i64 items() const { return 2 * r.from[0].size[0] * blocks; }
  static void run_item(void* self, i64 index) { static_cast<const Rotate*>(self)->run(index); }

 private:
  // The tables' rows of that many tokens stay in the first-level cache while the heads go by.
  static constexpr i64 kTokens = 32;

  const Rotation& r;
  i64 blocks;

  struct Scratch {
    T *row, *cos, *sin;
  };

  Scratch layout(Arena& arena) const {
    const i64 half = r.cos.size[2];
    return {arena.take<T>(r.from[0].size[3]), arena.take<T>(half), arena.take<T>(half)};
  }

  void run(i64 index) const {
    const int side = static_cast<int>(index % 2);
    const i64 b = index / 2 / blocks, first = index / 2 % blocks * kTokens;
    const View &from = r.from[side], &to = r.to[side];
    const i64 last = smaller(first + kTokens, from.size[2]), dim = from.size[3], half = r.cos.size[2];
    Arena measure(nullptr);
    layout(measure);
    Arena arena(thread_scratch(measure.used()));
    const Scratch s = layout(arena);
    for (i64 h = 0; h < from.size[1]; ++h)
      for (i64 i = first; i < last; ++i) {
        load_row(from.dtype, from.at(b, h, i), from.stride[3], dim, s.row);
        const i64 at = table_row(b, i);
        const T* const c = table(r.cos, b, at, s.cos);
        const T* const sine = table(r.sin, b, at, s.sin);
        const T sign = r.conjugate ? T(-1) : T(1);
        if (r.interleaved)
          turn_pairs(s.row, c, sine, sign, half);
        else
          turn_halves(s.row, c, sine, sign, half);
        store_row(to.dtype, s.row, dim, to.mutable_at(b, h, i));
      }
  }

  i64 table_row(i64 b, i64 i) const {
    const i64 at = r.positions ? *reinterpret_cast<const i64*>(r.positions.at(b, i)) : i;
    return larger(i64{0}, smaller(at, r.cos.size[1] - 1));
  }

  static const T* table(const View& view, i64 b, i64 at, T* temp) {
    if (view.stride[2] == 1) return reinterpret_cast<const T*>(view.at(b, at));
    load_row(view.dtype, view.at(b, at), view.stride[2], view.size[2], temp);
    return temp;
  }

  static void turn_halves(T* x, const T* c, const T* s, T sign, i64 half) {
    i64 k = 0;
    for (; k + kLanes<T> <= half; k += kLanes<T>) {
      const Vec<T> x0 = load(x + k), x1 = load(x + half + k), ck = load(c + k), sk = load(s + k) * sign;
      store(x + k, x0 * ck - x1 * sk);
      store(x + half + k, x1 * ck + x0 * sk);
    }
    for (; k < half; ++k) {
      const T x0 = x[k], x1 = x[half + k], sk = s[k] * sign;
      x[k] = x0 * c[k] - x1 * sk;
      x[half + k] = x1 * c[k] + x0 * sk;
    }
  }

  static void turn_pairs(T* __restrict x, const T* __restrict c, const T* __restrict s, T sign, i64 half) {
    for (i64 k = 0; k < half; ++k) {
      const T x0 = x[2 * k], x1 = x[2 * k + 1], ck = c[k], sk = s[k] * sign;
      x[2 * k] = x0 * ck - x1 * sk;
      x[2 * k + 1] = x1 * ck + x0 * sk;
    }
  }
};

template <class T>
inline void rotate(const Rotation& rotation, const Parallel& parallel) {
  Rotate<T> kernel(rotation);
  parallel.run(kernel.items(), &Rotate<T>::run_item, &kernel);
}

}  // namespace fastattn::cpu::FASTATTN_ISA
