// From strided tensors of any dtype to the operands of gemm: conversion, rotation, zero padding, and a flag on every
// row that holds a NaN or an infinity.  Flagged rows are packed as zeros, so that 0 * NaN can never carry a masked
// row into a result; the pairs that do see such a row are put right one by one (see fixups in the kernels).
#pragma once

#include <cstring>

#include "pieces.h"

namespace fastattn::cpu::FASTATTN_ISA {

// Rows of one (batch, head) of query, key, value or an output gradient, rotated if the view says so.
template <class T>
struct RowSource {
  const char* data = nullptr;
  DType dtype = DType::kFloat32;
  i64 row_stride = 0, column_stride = 1, columns = 0;  // strides in elements
  const View* cosine = nullptr;
  const View* sine = nullptr;
  i64 batch = 0, position = 0;  // row r is rotated by row position + r of the tables
  bool interleaved = false;

  RowSource() = default;
  RowSource(const View& view, i64 b, i64 h)
      : data(view.at(b, h)),
        dtype(view.dtype),
        row_stride(view.stride[2]),
        column_stride(view.stride[3]),
        columns(view.size[3]),
        batch(b) {}

  RowSource& rotated(const View& c, const View& s, i64 first_position, bool pairs) {
    if (c) cosine = &c, sine = &s, position = first_position, interleaved = pairs;
    return *this;
  }

  // (x0, x1) -> (x0 c - x1 s, x1 c + x0 s); the transpose for gradients.
  void rotate(i64 row, T* x, bool transposed) const {
    const i64 half = cosine->size[2];
    if (half == 0 || cosine->size[1] == 0) return;
    const i64 at = larger(i64{0}, smaller(position + row, cosine->size[1] - 1));
    const T* c = reinterpret_cast<const T*>(cosine->at(batch, at));
    const T* s = reinterpret_cast<const T*>(sine->at(batch, at));
    const i64 cs = cosine->stride[2], ss = sine->stride[2];
    const T sign = transposed ? T(-1) : T(1);
    if (interleaved) {
      for (i64 k = 0; k < half; ++k) {
        const T x0 = x[2 * k], x1 = x[2 * k + 1], sk = sign * s[k * ss], ck = c[k * cs];
        x[2 * k] = x0 * ck - x1 * sk;
        x[2 * k + 1] = x1 * ck + x0 * sk;
      }
    } else {
      for (i64 k = 0; k < half; ++k) {
        const T x0 = x[k], x1 = x[k + half], sk = sign * s[k * ss], ck = c[k * cs];
        x[k] = x0 * ck - x1 * sk;
        x[k + half] = x1 * ck + x0 * sk;
      }
    }
  }

  // Whether rotate_vectors() takes these rows: dense ones whose halves fill whole vectors.
  bool rotates_vectors() const {
    constexpr DType own = sizeof(T) == 4 ? DType::kFloat32 : DType::kFloat64;
    constexpr i64 n = kLanes<T>;
    const bool half_precision = sizeof(T) == 4 && (dtype == DType::kBFloat16 || dtype == DType::kFloat16);
    return cosine && !interleaved && (dtype == own || half_precision) && column_stride == 1 && columns % n == 0 &&
           cosine->size[1] > 0 && cosine->size[2] % n == 0 && cosine->stride[2] == 1 && sine->stride[2] == 1;
  }

  // Hands the vectors of a rotated row to keep(first column, vector).
  template <class Number, class Keep>
  FASTATTN_INLINE void rotate_vectors(i64 row, Keep keep) const {
    const Number* const x = reinterpret_cast<const Number*>(data) + row * row_stride;
    const i64 half = cosine->size[2], at = larger(i64{0}, smaller(position + row, cosine->size[1] - 1));
    const T *const c = reinterpret_cast<const T*>(cosine->at(batch, at)), *const s = reinterpret_cast<const T*>(
                                                                              sine->at(batch, at));
    for (i64 k = 0; k < half; k += kLanes<T>) {
      const Vec<T> x0 = load_numbers(x + k), x1 = load_numbers(x + half + k), ck = load_numbers(c + k),
                   sk = load_numbers(s + k);
      keep(k, x0 * ck - x1 * sk);
      keep(half + k, x1 * ck + x0 * sk);
    }
    for (i64 k = 2 * half; k < columns; k += kLanes<T>) keep(k, load_numbers(x + k));
  }

  void load(i64 row, T* out) const {
    load_row<T>(dtype, data + row * row_stride * element_size(dtype), column_stride, columns, out);
    if (cosine) rotate(row, out, false);
  }
};

// n numbers as operands, the pieces `apart` elements from each other; n is a multiple of 16 where operands are pairs.
template <class Mode>
inline void to_operand(const typename Mode::Acc* row, i64 n, typename Mode::A* out, [[maybe_unused]] i64 apart) {
  if constexpr (Mode::kPair == 1) {
    if (row != out) std::memcpy(out, row, n * sizeof(*out));
  } else {
#if defined(FASTATTN_BF16_OPERANDS)
    i64 i = 0;
    for (; i + 32 <= n; i += 32) store_pieces<Mode::kPieces>(load(row + i), load(row + i + 16), out + i, apart);
    if (i < n) store_pieces<Mode::kPieces>(load(row + i), out + i, apart);
#endif
  }
}

// Copies n elements and says whether all are finite.
template <class T>
FASTATTN_INLINE bool copy_finite(const T* row, i64 n, T* out) {
  using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>>;
  constexpr Bits exponent = sizeof(T) == 2 ? Bits{0x7f80} : sizeof(T) == 4 ? Bits(0x7f800000u) : Bits(0x7ffull << 52);
  Bits bad = 0;
  for (i64 i = 0; i < n; ++i) {
    Bits bits;
    std::memcpy(&bits, row + i, sizeof(T));
    std::memcpy(out + i, &bits, sizeof(T));
    bad |= static_cast<Bits>((bits & exponent) == exponent);
  }
  return bad == 0;
}

// The number that an operand stands for.
template <class Mode>
FASTATTN_INLINE typename Mode::Acc number_of(const typename Mode::A* operand, i64 apart) {
  if constexpr (Mode::kPair == 1) {
    return *operand;
  } else {
    float sum = 0;
    for (int i = 0; i < Mode::kPieces; ++i) sum += bf16_to_float(operand[i * apart]);
    return sum;
  }
}

// Whether everything seen was finite: an exponent of all ones carries into the sign when its last bit is added.
template <class B, int kPair>
struct FiniteCheck {
  using Bits = std::conditional_t<sizeof(B) == 4, uint32_t, uint64_t>;
  static constexpr Bits kExponent = kPair == 2       ? Bits{0x7f807f80u}
                                    : sizeof(B) == 4 ? Bits{0x7f800000u}
                                                     : static_cast<Bits>(0x7ff0000000000000ull);
  static constexpr Bits kOne = kExponent & ~(kExponent << 1),
                        kSign = ~(kExponent | (kExponent >> 1)) & (kExponent << 1);
  Vec<Bits> seen = {};

  FASTATTN_INLINE void add(Vec<B> v) { seen |= ((Vec<Bits>)v & kExponent) + kOne; }
  FASTATTN_INLINE bool finite() const {
    Bits any = 0;
    for (int i = 0; i < kLanes<B>; ++i) any |= seen[i];
    return !(any & kSign);
  }
};

#if defined(FASTATTN_BF16_OPERANDS)
// Rows of n numbers, a multiple of 32, as pieces; whether all are finite.
template <int kPieces, class T>
inline bool split_rows(const T* row, i64 row_stride, i64 rows, i64 n, bf16* out) {
  FiniteCheck<float, 1> check;
  for (i64 r = 0; r < rows; ++r, row += row_stride, out += kPieces * n) {
    for (i64 i = 0; i < n; i += 32) {
      const Vec<float> x = load_numbers(row + i), y = load_numbers(row + i + 16);
      check.add(x);
      check.add(y);
      store_pieces<kPieces>(x, y, out + i, n);
    }
  }
  return check.finite();
}
#endif

// Rotated rows as operands; whether all are finite.
template <class Mode, class Number>
inline bool rotate_numbers(const RowSource<typename Mode::Acc>& source, i64 first, i64 rows, i64 width,
                           typename Mode::A* out) {
  using Acc = typename Mode::Acc;
  FiniteCheck<Acc, 1> check;
  for (i64 r = 0; r < rows; ++r, out += Mode::kPieces * width)
    source.template rotate_vectors<Number>(first + r, [&](i64 k, Vec<Acc> x) __attribute__((always_inline)) {
      check.add(x);
      if constexpr (Mode::kPair == 1) {
        store(out + k, x);
      } else {
#if defined(FASTATTN_BF16_OPERANDS)
        store_pieces<Mode::kPieces>(x, out + k, width);
#endif
      }
    });
  return check.finite();
}

// The same of rows that rotates_vectors() says can be taken.
template <class Mode>
inline bool rotate_rows(const RowSource<typename Mode::Acc>& source, i64 first, i64 rows, i64 width,
                        typename Mode::A* out) {
  if constexpr (sizeof(typename Mode::Acc) == 4) {
    if (source.dtype == DType::kBFloat16) return rotate_numbers<Mode, BFloat16>(source, first, rows, width, out);
    if (source.dtype == DType::kFloat16) return rotate_numbers<Mode, Half>(source, first, rows, width, out);
  }
  return rotate_numbers<Mode, typename Mode::Acc>(source, first, rows, width, out);
}

// A row as an operand, its pieces `width` apart: zeros if it is not finite (and then the answer is false).  Columns
// past the source's must be zero in `staging`.
template <class Mode>
inline bool load_operand(const RowSource<typename Mode::Acc>& source, i64 row, i64 width, typename Mode::Acc* staging,
                         typename Mode::A* out) {
  using A = typename Mode::A;
  constexpr DType own = sizeof(A) == 2 ? DType::kBFloat16 : sizeof(A) == 4 ? DType::kFloat32 : DType::kFloat64;
  if (Mode::kPieces == 1 && source.dtype == own && source.column_stride == 1 && !source.cosine) {
    const A* from = reinterpret_cast<const A*>(source.data) + row * source.row_stride;
    const bool finite = copy_finite(from, source.columns, out);
    if (source.columns < width) std::memset(out + source.columns, 0, (width - source.columns) * sizeof(A));
    if (!finite) std::memset(out, 0, width * sizeof(A));
    return finite;
  }
  if (source.columns == width && source.rotates_vectors()) {
    const bool finite = rotate_rows<Mode>(source, row, 1, width, out);
    if (!finite) std::memset(out, 0, Mode::kPieces * width * sizeof(A));
    return finite;
  }
  source.load(row, staging);
  if (!all_finite(staging, source.columns)) {
    std::memset(staging, 0, source.columns * sizeof(*staging));
    std::memset(out, 0, Mode::kPieces * width * sizeof(A));
    return false;
  }
  to_operand<Mode>(staging, width, out, width);
  return true;
}

// Whole vectors of B operands straight from a row in memory: the way of the usual calls (dense rows that fill whole
// vectors, no rotation), several times as fast as the general one.
enum class Straight { kNo, kOwn, kHalf, kBFloat16 };

template <class Mode>
inline Straight straight(const RowSource<typename Mode::Acc>& source) {
  constexpr bool split = Mode::kPieces > 1;
  using A = std::conditional_t<split, float, typename Mode::A>;
  constexpr DType own = sizeof(A) == 2 ? DType::kBFloat16 : sizeof(A) == 4 ? DType::kFloat32 : DType::kFloat64;
  const bool whole_vectors = source.columns > 0 && source.columns % (kLanes<typename Mode::B> * Mode::kPair) == 0;
  if (source.column_stride != 1 || source.cosine || !whole_vectors) return Straight::kNo;
  if (source.dtype == own) return Straight::kOwn;
#if defined(__F16C__)
  if (sizeof(A) == 4 && source.dtype == DType::kFloat16) return Straight::kHalf;
#endif
#if defined(__AVX2__)
  if (sizeof(A) == 4 && !split && source.dtype == DType::kBFloat16) return Straight::kBFloat16;
#endif
  return Straight::kNo;
}

// Dense rows that fill whole vectors, as operands: copied, split or rotated, and checked together.  False, with nothing
// promised of `out`, where they are of another kind or one is not finite.
template <class Mode>
inline bool copy_rows(const RowSource<typename Mode::Acc>& source, i64 first, i64 rows, i64 width,
                      typename Mode::A* out) {
  using A = typename Mode::A;
  using B = typename Mode::B;
  constexpr i64 n = kLanes<A>;
  if (source.columns == width && source.rotates_vectors()) return rotate_rows<Mode>(source, first, rows, width, out);
  const Straight kind = straight<Mode>(source);
  if (kind == Straight::kNo || source.columns != width) return false;
  const char* const start = source.data + first * source.row_stride * element_size(source.dtype);
#if defined(FASTATTN_BF16_OPERANDS)
  if constexpr (Mode::kPieces > 1)
    return kind == Straight::kOwn
               ? split_rows<Mode::kPieces>(reinterpret_cast<const float*>(start), source.row_stride, rows, width, out)
               : split_rows<Mode::kPieces>(reinterpret_cast<const Half*>(start), source.row_stride, rows, width, out);
#endif
  if (kind != Straight::kOwn) return false;
  const A* from = reinterpret_cast<const A*>(start);
  FiniteCheck<B, Mode::kPair> check;
  for (i64 r = 0; r < rows; ++r, from += source.row_stride, out += width)
    for (i64 d = 0; d < width; d += n) {
      const Vec<B> v = load(reinterpret_cast<const B*>(from + d));
      check.add(v);
      store(reinterpret_cast<B*>(out + d), v);
    }
  return check.finite();
}

// A operand: rows [first, first + rows) one after the other, each with its pieces of `width` elements, padded with zero
// columns.  Returns whether any row was flagged.
template <class Mode>
inline bool pack_rows(const RowSource<typename Mode::Acc>& source, i64 first, i64 rows, i64 width,
                      typename Mode::Acc* staging, typename Mode::A* out, uint8_t* bad) {
  if (rows > 0 && copy_rows<Mode>(source, first, rows, width, out)) {
    std::memset(bad, 0, rows);
    return false;
  }
  bool any = false;
  std::memset(staging, 0, width * sizeof(*staging));
  for (i64 r = 0; r < rows; ++r) {
    bad[r] = !load_operand<Mode>(source, first + r, width, staging, out + r * Mode::kPieces * width);
    any |= bad[r];
  }
  return any;
}

template <class B, Straight kFrom>
FASTATTN_INLINE Vec<B> load_straight(const char* row, i64 k) {
  if constexpr (kFrom == Straight::kOwn) {
    return load(reinterpret_cast<const B*>(row) + k);
  } else {
    if constexpr (kFrom == Straight::kHalf) return load_numbers(reinterpret_cast<const Half*>(row) + k);
    return load_numbers(reinterpret_cast<const BFloat16*>(row) + k);
  }
}

// One transposed block: `lanes` rows from `row` on.  False, with nothing promised of `panel`, if one is not finite.
template <class Mode, Straight kFrom>
inline bool transpose_block(const char* row, i64 row_bytes, i64 steps, typename Mode::B* panel) {
  using B = typename Mode::B;
  constexpr int lanes = kLanes<B>;
  if constexpr (Mode::kPieces > 1) {
    FiniteCheck<float, 1> check;
    for (i64 k = 0; k < steps; k += lanes / 2) {
      Vec<float> v[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        v[i] = load_straight<float, kFrom>(row + i * row_bytes, 2 * k);
        check.add(v[i]);
      }
      transpose<float>(v);
#pragma GCC unroll 8
      for (int i = 0; i < lanes / 2; ++i) {
        Vec<float> a[Mode::kPieces], b[Mode::kPieces];
        split<Mode::kPieces>(v[2 * i], a);
        split<Mode::kPieces>(v[2 * i + 1], b);
        for (int piece = 0; piece < Mode::kPieces; ++piece)
          store(panel + (piece * steps + k + i) * Mode::kPanel, pair_halves(a[piece], b[piece]));
      }
    }
    return check.finite();
  } else {
    FiniteCheck<B, Mode::kPair> check;
    for (i64 k = 0; k < steps; k += lanes) {
      Vec<B> v[lanes];
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) {
        v[i] = load_straight<B, kFrom>(row + i * row_bytes, k);
        check.add(v[i]);
      }
      transpose<B>(v);
#pragma GCC unroll 16
      for (int i = 0; i < lanes; ++i) store(panel + (k + i) * Mode::kPanel, v[i]);
    }
    return check.finite();
  }
}

template <class Mode>
inline bool transpose_straight(Straight from, const char* row, i64 row_bytes, i64 steps, typename Mode::B* panel) {
  if (from == Straight::kOwn) return transpose_block<Mode, Straight::kOwn>(row, row_bytes, steps, panel);
  if constexpr (Mode::kPieces > 1) return transpose_block<Mode, Straight::kHalf>(row, row_bytes, steps, panel);
  if constexpr (Mode::kPair == 1 && sizeof(typename Mode::A) == 4) {
    if (from == Straight::kHalf) return transpose_block<Mode, Straight::kHalf>(row, row_bytes, steps, panel);
    if (from == Straight::kBFloat16) return transpose_block<Mode, Straight::kBFloat16>(row, row_bytes, steps, panel);
  }
  return false;
}

// B operand with the rows of the tensor as columns (K^T, V^T): panels of [kPieces][depth / kPair][kPanel].  `staging`
// holds kPackRows rows of `width` numbers, where width is the depth rounded up to whole transposed blocks.
template <class Mode>
constexpr i64 kPackRows = kLanes<typename Mode::B> * Mode::kPieces + 1;

template <class Mode>
inline bool pack_transposed(const RowSource<typename Mode::Acc>& source, i64 first, i64 rows, i64 padded_rows,
                            i64 depth, i64 width, typename Mode::Acc* staging, typename Mode::B* out, uint8_t* bad) {
  using Acc = typename Mode::Acc;
  using B = typename Mode::B;
  constexpr int lanes = kLanes<B>;
  const i64 steps = depth / Mode::kPair;
  const i64 stride = width / Mode::kPair;
  constexpr int pieces = Mode::kPieces;
  Acc* const row = staging + lanes * pieces * width;
  B* const block = reinterpret_cast<B*>(staging);  // lanes rows of all pieces
  std::memset(static_cast<void*>(row), 0, width * sizeof(Acc));
  bool any = false;
  const Straight from = straight<Mode>(source);
  const i64 row_bytes = source.row_stride * element_size(source.dtype);
  for (i64 r = 0; r < padded_rows; r += lanes) {
    B* const panel = out + r / Mode::kPanel * (pieces * steps * Mode::kPanel) + r % Mode::kPanel;
    if (from != Straight::kNo && r + lanes <= rows &&
        transpose_straight<Mode>(from, source.data + (first + r) * row_bytes, row_bytes, steps, panel)) {
      std::memset(bad + r, 0, lanes);
      continue;
    }
    const bool copied = r + lanes <= rows &&
                        copy_rows<Mode>(source, first + r, lanes, width, reinterpret_cast<typename Mode::A*>(block));
    if (copied) std::memset(bad + r, 0, lanes);
    for (i64 i = copied ? lanes : 0; i < lanes; ++i) {
      if (r + i < rows) {
        bad[r + i] = !load_operand<Mode>(source, first + r + i, width, row,
                                         reinterpret_cast<typename Mode::A*>(block + i * pieces * stride));
        any |= bad[r + i];
      } else {
        std::memset(static_cast<void*>(block + i * pieces * stride), 0, pieces * stride * sizeof(B));
      }
    }
    for (i64 piece = 0; piece < pieces; ++piece)
      for (i64 k = 0; k < steps; k += lanes) {
        Vec<B> v[lanes];
#pragma GCC unroll 16
        for (int i = 0; i < lanes; ++i) v[i] = load(block + (i * pieces + piece) * stride + k);
        transpose<B>(v);
        const i64 count = smaller(i64{lanes}, steps - k);
        for (i64 i = 0; i < count; ++i) store(panel + (piece * steps + k + i) * Mode::kPanel, v[i]);
      }
  }
  return any;
}

// `rows` rows (of depth, a multiple of kPair) as panels of `panel_size` elements, `width` columns with zeros past
// `columns`.  False, with nothing promised of `target`, if one is not finite.
template <class Mode, Straight kFrom>
inline bool panel_rows(const char* row, i64 row_bytes, i64 rows, i64 columns, i64 width, i64 panel_size,
                       typename Mode::B* target) {
  using B = typename Mode::B;
  constexpr int lanes = kLanes<B>;
  if constexpr (Mode::kPieces > 1) {
    FiniteCheck<float, 1> check;
    for (i64 r = 0; r < rows; r += 2, row += 2 * row_bytes, target += Mode::kPanel)
      for (i64 n = 0; n < width; n += lanes) {
        Vec<float> x = {}, y = {}, a[Mode::kPieces], b[Mode::kPieces];
        if (n < columns) {
          x = load_straight<float, kFrom>(row, n), y = load_straight<float, kFrom>(row + row_bytes, n);
          check.add(x);
          check.add(y);
        }
        split<Mode::kPieces>(x, a);
        split<Mode::kPieces>(y, b);
        B* const cell = target + n / Mode::kPanel * Mode::kPieces * panel_size + n % Mode::kPanel;
        for (int piece = 0; piece < Mode::kPieces; ++piece)
          store(cell + piece * panel_size, pair_halves(a[piece], b[piece]));
      }
    return check.finite();
  } else {
    FiniteCheck<B, Mode::kPair> check;
    for (i64 r = 0; r < rows; r += Mode::kPair, row += Mode::kPair * row_bytes, target += Mode::kPanel) {
      for (i64 n = 0; n < width; n += lanes * Mode::kPair) {
        const auto cell = [=](i64 column) {
          return target + column / Mode::kPanel * panel_size + column % Mode::kPanel;
        };
        if (n >= columns) {
          for (int i = 0; i < Mode::kPair; ++i) store(cell(n + i * lanes), Vec<B>{});
        } else if constexpr (Mode::kPair == 1) {
          const Vec<B> v = load_straight<B, kFrom>(row, n);
          check.add(v);
          store(cell(n), v);
        } else {  // two rows as one row of pairs, the first one in the low halves
          const Vec<B> a = load_straight<B, kFrom>(row, n / 2), b = load_straight<B, kFrom>(row + row_bytes, n / 2);
          check.add(a);
          check.add(b);
          interleave<uint16_t>((Vec<uint16_t>)a, (Vec<uint16_t>)b, reinterpret_cast<uint16_t*>(cell(n)),
                               reinterpret_cast<uint16_t*>(cell(n + lanes)));
        }
      }
    }
    return check.finite();
  }
}

template <class Mode>
inline bool panel_rows_straight(Straight from, const char* row, i64 row_bytes, i64 rows, i64 columns, i64 width,
                                i64 panel_size, typename Mode::B* target) {
  if (from == Straight::kOwn)
    return panel_rows<Mode, Straight::kOwn>(row, row_bytes, rows, columns, width, panel_size, target);
  if constexpr (Mode::kPieces > 1)
    return panel_rows<Mode, Straight::kHalf>(row, row_bytes, rows, columns, width, panel_size, target);
  if constexpr (Mode::kPair == 1 && sizeof(typename Mode::A) == 4) {
    if (from == Straight::kHalf)
      return panel_rows<Mode, Straight::kHalf>(row, row_bytes, rows, columns, width, panel_size, target);
    if (from == Straight::kBFloat16)
      return panel_rows<Mode, Straight::kBFloat16>(row, row_bytes, rows, columns, width, panel_size, target);
  }
  return false;
}

// B operand with the rows of the tensor as depth (V, K): panels of [kPieces][padded_rows / kPair][kPanel] over the
// columns.  `staging` holds kPackRows rows of `width` numbers, where width is a multiple of kWholeColumns.
template <class Mode>
inline bool pack_depth(const RowSource<typename Mode::Acc>& source, i64 first, i64 rows, i64 padded_rows, i64 width,
                       typename Mode::Acc* staging, typename Mode::B* out, uint8_t* bad) {
  using A = typename Mode::A;
  const i64 panel_size = padded_rows / Mode::kPair * Mode::kPanel;
  constexpr int pieces = Mode::kPieces;
  A* const operands = reinterpret_cast<A*>(staging + width);  // kPair rows of all pieces
  bool any = false;
  std::memset(staging, 0, width * sizeof(*staging));
  const Straight from = straight<Mode>(source);
  const i64 row_bytes = source.row_stride * element_size(source.dtype);
  constexpr i64 kBlockRows = 16;  // checked, and if need be packed again, together
  for (i64 r = 0; r < padded_rows; r += Mode::kPair) {
    if (from != Straight::kNo && r % kBlockRows == 0 && r + kBlockRows <= rows &&
        panel_rows_straight<Mode>(from, source.data + (first + r) * row_bytes, row_bytes, kBlockRows, source.columns,
                                  width, panel_size, out + r / Mode::kPair * Mode::kPanel)) {
      std::memset(bad + r, 0, kBlockRows);
      r += kBlockRows - Mode::kPair;
      continue;
    }
    for (i64 i = 0; i < Mode::kPair; ++i) {
      if (r + i < rows) {
        bad[r + i] = !load_operand<Mode>(source, first + r + i, width, staging, operands + i * pieces * width);
        any |= bad[r + i];
      } else {
        std::memset(operands + i * pieces * width, 0, pieces * width * sizeof(A));
      }
    }
    typename Mode::B* const target = out + r / Mode::kPair * Mode::kPanel;
    constexpr i64 lanes = kLanes<typename Mode::B>;
    for (i64 piece = 0; piece < pieces; ++piece)
      for (i64 n = 0; n < width; n += lanes * Mode::kPair) {
        const auto cell = [=](i64 column) {
          return target + (column / Mode::kPanel * pieces + piece) * panel_size + column % Mode::kPanel;
        };
        const A* const from = operands + piece * width + n;
        if constexpr (Mode::kPair == 1)
          store(cell(n), load(from));
        else  // two rows as one row of pairs, the first one in the low halves
          interleave<uint16_t>(load(from), load(from + pieces * width), reinterpret_cast<uint16_t*>(cell(n)),
                               reinterpret_cast<uint16_t*>(cell(n + lanes)));
      }
  }
  return any;
}

#if defined(FASTATTN_BF16_OPERANDS)
// The transpose of a packed A operand of `rows` (a multiple of 32) rows of `width` elements (of each piece): width rows
// of `rows` (of each piece).
template <int kPieces>
inline void transpose_rows(const bf16* in, i64 rows, i64 width, bf16* out) {
  const i64 stride = kPieces * width;
  for (i64 r = 0; r < rows; r += 32)
    for (i64 k = 0; k < stride; k += 16) {
      Vec<uint32_t> v[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const bf16* cell = in + (r + 2 * i) * stride + k;
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(cell)));
        const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(cell + stride)));
        v[i] = (Vec<uint32_t>)_mm512_or_si512(low, _mm512_slli_epi32(high, 16));
      }
      transpose<uint32_t>(v);
      const i64 piece = k / width, column = k - piece * width;
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i)
        store(reinterpret_cast<uint32_t*>(out + ((column + i) * kPieces + piece) * rows + r), v[i]);
    }
}
#endif

// Columns [first, first + lanes) of a row-major matrix as rows `width` apart; `depth` is a multiple of the lanes.
template <class T>
inline void columns_to_rows(const T* in, i64 row_stride, i64 first, i64 depth, T* out, i64 width) {
  constexpr int lanes = kLanes<T>;
  for (i64 k = 0; k < depth; k += lanes) {
    Vec<T> v[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) v[i] = load(in + (k + i) * row_stride + first);
    transpose<T>(v);
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) store(out + i * width + k, v[i]);
  }
}

template <class T>
inline T dot(const T* a, const T* b, i64 n) {
  T sum = 0;
  for (i64 k = 0; k < n; ++k) sum += a[k] * b[k];
  return sum;
}

}  // namespace fastattn::cpu::FASTATTN_ISA
