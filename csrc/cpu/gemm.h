// C (+)= A B on small matrices: the only place where multiply-add instructions are chosen.
//
// A is read by broadcast, straight from wherever it lies: element (m, k) at a[m * a_row + k * a_depth].
// B is in panels of kPanel columns: element (k, n) at b[(n / kPanel) * b_panel + k * b_row + n % kPanel]; a
// row-major matrix is the case b_panel = kPanel.  C is row-major.
// For bfloat16 operands an element of B is a pair (k, k + 1) of one column in 32 bits, A has its depth dense, and
// depth counts single elements and is a multiple of kDepthMultiple.
// Where a number is a sum of kPieces such operands (pieces.h), the pieces of A are a_piece apart, those of B b_piece.
// n is a multiple of the vector length; C has room for kRowMultiple rows (the surplus is scribbled on).
#pragma once

#include "convert.h"
#include "vec.h"

#if defined(__AMX_BF16__)
#include "gemm_amx.h"
#endif

namespace fastattn::cpu::FASTATTN_ISA {

#if defined(__AMX_BF16__)
constexpr bool kTileRegisters = true;
#else
constexpr bool kTileRegisters = false;
#endif

// Register blocking kRows x (kVectors * lanes): as many accumulators as leave room for the B vectors and one
// broadcast.  With 32 registers 6 x 4 wants 10 loads for 24 FMAs, and panels of 64 columns divide the usual
// head dimensions.
constexpr int kVectors = kVectorRegisters >= 32 ? 4 : 2;
constexpr int kRows = 6;
// Of one vector: as many rows as hide the latency of their sums.
constexpr int kSingleRows = kVectorRegisters / 2;

template <class Number>
struct PlainMode {
  using Acc = Number;
  using A = Number;
  using B = Number;
  static constexpr int kPair = 1;           // elements of depth in one element of B
  static constexpr int kPieces = 1;         // operands that a number is the sum of
  static constexpr int kDepthMultiple = 1;  // depth is padded with zeros to a multiple of this
  static constexpr int kRowMultiple = 1;
  static constexpr int kExpDegree = sizeof(Number) == 4 ? 5 : 13;  // of exp2's polynomial
  // Of a tile of scores: whole vectors, and whole draws of Philox, which come in fours.
  static constexpr int kColumnMultiple = kLanes<Number> < 4 ? 4 : kLanes<Number>;
  static constexpr int kPanel = kVectors * kLanes<Number>;
};
using Float32Mode = PlainMode<float>;
using Float64Mode = PlainMode<double>;

#if defined(__AVX512BF16__)
#define FASTATTN_BF16_OPERANDS 1
template <int kCount>
struct BFloat16Pieces {
  using Acc = float;
  using A = bf16;
  using B = uint32_t;
  static constexpr int kPair = 2;
  static constexpr int kPieces = kCount;
  static constexpr int kDepthMultiple = 32;
  static constexpr int kRowMultiple = 16;
  static constexpr int kExpDegree = kCount == 1 ? 4 : 5;
  static constexpr int kColumnMultiple = 32;
  // A tile is then 1 KiB in a row: from wider panels it takes lines of every second or fourth set of the cache.
  static constexpr int kPanel = kTileRegisters ? 16 : kVectors * kLanes<float>;
};
using BFloat16Mode = BFloat16Pieces<1>;
#endif

// c + a b, lane by lane; a pair of b makes two products.
template <class Mode>
FASTATTN_INLINE Vec<typename Mode::Acc> multiply_add_lanes(Vec<typename Mode::B> a, Vec<typename Mode::B> b,
                                                           Vec<typename Mode::Acc> c) {
#if defined(FASTATTN_BF16_OPERANDS)
  if constexpr (Mode::kPair == 2)
    return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
  else
#endif
    return c + a * b;
}

template <class Mode>
FASTATTN_INLINE Vec<typename Mode::Acc> multiply_add(const typename Mode::A* a, Vec<typename Mode::B> b,
                                                     Vec<typename Mode::Acc> c) {
#if defined(FASTATTN_BF16_OPERANDS)
  if constexpr (Mode::kPair == 2) {
    int pair;
    std::memcpy(&pair, a, 4);
    return (Vec<float>)_mm512_dpbf16_ps((__m512)c, (__m512bh)_mm512_set1_epi32(pair), (__m512bh)b);
  } else
#endif
    return c + *a * b;
}

// Steps of depth that are summed one after the other before the sum joins those before it: with S keys in a row the
// error of the output would grow as S does.  What is rounded to bfloat16 does not show as much.
template <class Mode>
constexpr i64 kInARow = Mode::kPair == 1 ? 128 : 256;

template <class Mode, int kM, int kN>
inline void micro_kernel(i64 depth, const typename Mode::A* a, i64 a_row, i64 a_depth, const typename Mode::B* b,
                         i64 b_row, typename Mode::Acc* c, i64 c_row, bool accumulate) {
  using Acc = typename Mode::Acc;
  constexpr int lanes = kLanes<Acc>;
  Vec<Acc> sum[kM][kN];
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) sum[m][n] = Vec<Acc>{};
  for (i64 k = 0; k < depth; ++k, a += a_depth, b += b_row) {
    Vec<typename Mode::B> column[kN];
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) column[n] = load(b + n * lanes);
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m)
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) sum[m][n] = multiply_add<Mode>(a + m * a_row, column[n], sum[m][n]);
  }
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) {
      Acc* const at = c + m * c_row + n * lanes;
      store(at, accumulate ? load(at) + sum[m][n] : sum[m][n]);
    }
}

template <class Mode, int kN, int kM = kRows>
inline void panel_product(i64 m, i64 depth, const typename Mode::A* a, i64 a_row, i64 a_depth,
                          const typename Mode::B* b, i64 b_row, typename Mode::Acc* c, i64 c_row, bool accumulate) {
  for (; m >= kM; m -= kM, a += kM * a_row, c += kM * c_row) {
    i64 k = 0;
    do {
      micro_kernel<Mode, kM, kN>(smaller(kInARow<Mode>, depth - k), a + k * a_depth, a_row, a_depth, b + k * b_row,
                                 b_row, c, c_row, accumulate || k > 0);
      k += kInARow<Mode>;
    } while (k < depth);
  }
  if constexpr (kM > 1)
    if (m) panel_product<Mode, kN, kM == 6 ? 4 : kM / 2>(m, depth, a, a_row, a_depth, b, b_row, c, c_row, accumulate);
}

template <class Mode>
inline void gemm(i64 m, i64 n, i64 depth, const typename Mode::A* a, i64 a_row, i64 a_depth, const typename Mode::B* b,
                 i64 b_row, i64 b_panel, typename Mode::Acc* c, i64 c_row, bool accumulate,
                 [[maybe_unused]] i64 a_piece = 0, [[maybe_unused]] i64 b_piece = 0) {
#if defined(__AMX_BF16__)
  if constexpr (Mode::kPair == 2) {
    amx_gemm<Mode::kPanel, Mode::kPieces>(m, n, depth, a, a_row, a_piece, b, b_row, b_panel, b_piece, c, c_row,
                                          accumulate);
    return;
  }
#endif
  static_assert(kTileRegisters || Mode::kPieces == 1, "pieces pay where products cost next to nothing");
  constexpr int lanes = kLanes<typename Mode::Acc>;
  const i64 steps = depth / Mode::kPair, step = a_depth * Mode::kPair;
  for (; n >= Mode::kPanel; n -= Mode::kPanel, b += b_panel, c += Mode::kPanel)
    panel_product<Mode, kVectors>(m, steps, a, a_row, step, b, b_row, c, c_row, accumulate);
  if constexpr (kVectors > 2)
    if (n >= 2 * lanes) {
      panel_product<Mode, 2>(m, steps, a, a_row, step, b, b_row, c, c_row, accumulate);
      n -= 2 * lanes, b += 2 * lanes, c += 2 * lanes;
    }
  if (n > 0) panel_product<Mode, 1, kSingleRows>(m, steps, a, a_row, step, b, b_row, c, c_row, accumulate);
}

// Columns that are whole panels and whole operands.
template <class Mode>
constexpr i64 kWholeColumns = Mode::kPanel > Mode::kColumnMultiple ? Mode::kPanel : Mode::kColumnMultiple;

// From one row of `n` numbers to the next where many rows are read at a time: whole lines of the cache, or half of the
// loads would meet two, and one line more than a multiple of eight, or the rows would share sets.
template <class T>
constexpr i64 tile_row(i64 n) {
  constexpr i64 line = 64 / i64{sizeof(T)};
  const i64 row = round_up(n, line);
  return row % (8 * line) ? row : row + line;
}

// Tile registers are per-thread state: configured where a work item starts, released where it ends so that the
// thread's context stays small and other libraries find the unit as they left it.
template <class Mode>
struct TileScope {
#if defined(__AMX_BF16__)
  TileScope() {
    if constexpr (Mode::kPair == 2) amx_configure();
  }
  ~TileScope() {
    if constexpr (Mode::kPair == 2) _tile_release();
  }
#else
  TileScope() {}
#endif
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

}  // namespace fastattn::cpu::FASTATTN_ISA
