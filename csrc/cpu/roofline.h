// What the core can do, for the bench: loops that do nothing but one thing, and gemm on the tiles of attention.
#pragma once

#include <ctime>

#include "forward.h"
#include "kernels.h"

namespace fastattn::cpu::FASTATTN_ISA {

// Seconds of processor time of one call, the least of many: a neighbour can only add to it.
template <class Call>
inline double least_seconds(double budget, Call call) {
  const auto now = [] {
    timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  };
  double best = 1e9;
  for (const double began = now(); now() - began < budget;) {
    const double start = now();
    call();
    best = smaller(best, now() - start);
  }
  return best;
}

// Keeps values in registers and the loop around them.
template <class V>
FASTATTN_INLINE void keep(V& v) {
#if defined(__AVX512F__)
  __asm__ volatile("" : "+v"(v));
#elif defined(__SSE2__)
  __asm__ volatile("" : "+x"(v));
#elif defined(__aarch64__)
  __asm__ volatile("" : "+w"(v));
#else
  __asm__ volatile("" : "+m"(v));
#endif
}

template <class Mode>
inline double peak_flops(double budget) {
  using Acc = typename Mode::Acc;
#if defined(__AMX_BF16__)
  if constexpr (Mode::kPair == 2) {
    TileScope<Mode> tiles;
    constexpr i64 turns = 5000;
    const double seconds = least_seconds(budget, [] {
      for (i64 turn = 0; turn < turns; ++turn) {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    });
    return 2.0 * 16 * 16 * 32 * 4 * turns / seconds;
  }
#endif
  constexpr int n = kVectorRegisters >= 32 ? 24 : 12;
  constexpr i64 turns = 20000;
  const double seconds = least_seconds(budget, [] {
    // the lambda's own: what is captured by reference would live in memory
    Vec<Acc> sum[n] = {};
    Vec<typename Mode::B> a = {}, b = {};
    for (i64 turn = 0; turn < turns; ++turn) {
      keep(a);
      keep(b);
#pragma GCC unroll 24
      for (int i = 0; i < n; ++i) sum[i] = multiply_add_lanes<Mode>(a, b, sum[i]);
#pragma GCC unroll 24
      for (int i = 0; i < n; ++i) keep(sum[i]);
    }
  });
  return 2.0 * Mode::kPair * kLanes<Acc> * n * turns / seconds;
}

// gemm on a strip of queries: S = Q K^T (`values` false) or acc += P V.
template <class Mode>
inline double gemm_flops(double budget, i64 dim, bool values) {
  using A = typename Mode::A;
  using B = typename Mode::B;
  using Acc = typename Mode::Acc;
  const i64 rows = Forward<Mode>::kStrip, keys = Forward<Mode>::kMaxTile;
  const i64 n = values ? dim : keys, depth = values ? keys : dim;
  Buffer<A> a(rows * depth);
  Buffer<B> b(n * depth / Mode::kPair);
  Buffer<Acc> c(round_up(rows, Mode::kRowMultiple) * n);
  std::memset(static_cast<void*>(a.data()), 0, rows * depth * sizeof(A));
  std::memset(static_cast<void*>(b.data()), 0, n * depth / Mode::kPair * sizeof(B));
  std::memset(static_cast<void*>(c.data()), 0, rows * n * sizeof(Acc));
  TileScope<Mode> tiles;
  constexpr int turns = 256;  // a millisecond or more: the clock is off by some ten microseconds now and then
  const double seconds = least_seconds(budget, [&] {
    for (int turn = 0; turn < turns; ++turn)
      gemm<Mode>(rows, n, depth, a.data(), depth, 1, b.data(), Mode::kPanel, Mode::kPanel * (depth / Mode::kPair),
                 c.data(), n, values);
  });
  return 2.0 * turns * static_cast<double>(rows * n * depth) / seconds;
}

template <class Mode>
inline double weights_per_second(double budget) {
  using Acc = typename Mode::Acc;
  constexpr i64 n = 4096;
  constexpr int turns = 256;
  Buffer<Acc> row(n);
  for (i64 i = 0; i < n; ++i) row.data()[i] = Acc(-0.25);
  Acc total = 0;
  const double seconds = least_seconds(budget, [&] {
    for (int turn = 0; turn < turns; ++turn)
      total += row_max(row.data(), 0, n) +
               reduce_add<Acc>(row_exp<true, Mode::kExpDegree>(row.data(), 0, n, Acc(0), Acc(0.0625)));
  });
  return total == Acc(-1) ? 0 : turns * n / seconds;
}

template <class Mode>
inline Roofline roofline(double budget) {
  Roofline found;
  found.peak = peak_flops<Mode>(budget);
  for (int wide = 0; wide < 2; ++wide) {
    found.scores[wide] = gemm_flops<Mode>(budget, wide ? 128 : 64, false);
    found.values[wide] = gemm_flops<Mode>(budget, wide ? 128 : 64, true);
  }
  found.weights = weights_per_second<Mode>(budget);
  return found;
}

}  // namespace fastattn::cpu::FASTATTN_ISA
