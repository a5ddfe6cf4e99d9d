// Attention of a few query rows per key head, as in decoding.  Packing a tile of keys costs more than so few rows make
// of it, so keys and values are read where they lie (other dtypes and rotated keys a few rows at a time through a
// buffer that stays in the first-level cache), each once for all query heads of the group.
//
// A work item is one chunk of the keys of one (batch, key head), which gives every row a partial maximum, sum and
// accumulator; whoever finishes the last chunk joins them in their order.  Chunks follow from the shape alone, so
// results do not depend on the threads.
#pragma once

#include "arena.h"
#include "finish.h"

namespace fastattn::cpu::FASTATTN_ISA {

template <class Acc>
class Decode {
 public:
  static constexpr i64 kMaxRows = 8;

  // With more rows packed tiles are as fast, and with bfloat16 dot products from five rows on; but they leave threads
  // idle where heads are few.
  static bool takes(const Problem& p, bool dot_products) {
    const i64 rows = p.query_length * p.group();
    return rows <= 4 || (rows <= kMaxRows && (!dot_products || p.batch * p.kv_heads < 8));
  }

  Decode(const Problem& problem, const ForwardOutput& output) : p(problem), o(output) {
    rows = p.query_length * p.group();
    width = round_up(larger(p.head_dim, i64{1}), kLane);
    value_width = round_up(larger(p.value_dim, i64{1}), kLane);
    units = p.batch * p.kv_heads;
    // enough chunks for a machine with many threads, but none so short that its fixed cost shows
    const i64 share = round_up(ceil_div(larger(p.key_length, i64{1}) * units, 128), kTile);
    chunk = smaller(larger(share, i64{256}), i64{1024});
    chunks = ceil_div(larger(p.key_length, i64{1}), chunk);
    if (chunks > 1) {
      partials = Buffer<Acc>(units * chunks * rows * partial_width());
      arrived = Buffer<int>(units);
      std::memset(arrived.data(), 0, units * sizeof(int));
    }
  }

  i64 items() const { return units * chunks; }

  ForwardPlan plan() const {
    Arena measure(nullptr);
    layout(measure);
    return {p.query_length, p.group(), smaller(chunk, p.key_length), items(), static_cast<i64>(measure.used())};
  }

  static void run_item(void* self, i64 index) { static_cast<const Decode*>(self)->run(index); }

 private:
  static constexpr i64 kLane = kLanes<Acc>;
  static constexpr i64 kTile = 32;  // keys that pass through the first-level cache together
  // Rows that share a loaded key or value: their sums are registers.
  static constexpr int kRowBlock = kVectorRegisters == 32 && kLane >= 4 ? 4 : 2;
  // Rows are fetched so many bytes before they are read: a Xeon with AMX decodes from memory up to 1.7 times as fast
  // for it, a Zen 4 a fifth more slowly (README.md).
  static constexpr i64 kAheadBytes = kTileRegisters ? 8192 : 0;
  // bfloat16 by dot products where they are as fast as multiply-adds; processors with tile registers take four times as
  // long for one.
#if defined(FASTATTN_BF16_OPERANDS)
  using Dots = std::conditional_t<sizeof(Acc) == 4 && !kTileRegisters, BFloat16Mode, PlainMode<Acc>>;
#else
  using Dots = PlainMode<Acc>;
#endif
  // Sums of columns in registers; a few rows take more columns of a value at once.
  static constexpr int kSums = kVectorRegisters / 2, kVectors = kSums / kRowBlock;

  const Problem& p;
  const ForwardOutput& o;
  i64 rows, width, value_width, units, chunk, chunks;
  Buffer<Acc> partials;
  Buffer<int> arrived;

  struct Scratch {
    Acc *query, *scores, *temp, *tile, *accumulator;
    Acc *maximum, *sum;
    typename Dots::A* operands;  // the queries again, where keys meet them by dot products
  };

  Scratch layout(Arena& arena) const {
    Scratch s;
    s.query = arena.take<Acc>(rows * width);
    s.scores = arena.take<Acc>(rows * chunk);
    s.temp = arena.take<Acc>(larger(chunk, larger(width, value_width)));
    s.tile = arena.take<Acc>(kTile * larger(width, value_width));
    s.accumulator = arena.take<Acc>(rows * value_width);
    s.maximum = arena.take<Acc>(rows);
    s.sum = arena.take<Acc>(rows);
    s.operands = takes_dots() ? arena.take<typename Dots::A>(rows * width) : nullptr;
    return s;
  }

  // Whether products of queries and keys that lie there as operands are exact: they need no conversion then.
  bool takes_dots() const {
    return Dots::kPair == 2 && p.query.dtype == DType::kBFloat16 && !p.query_cos && width % (2 * kLane) == 0;
  }

  // Of one row and chunk: the accumulator, then maximum and sum.
  i64 partial_width() const { return value_width + kLane; }
  Acc* partial(i64 unit, i64 index, i64 row) const {
    return partials.data() + ((unit * chunks + index) * rows + row) * partial_width();
  }

  void run(i64 item) const {
    const i64 unit = item / chunks, index = item % chunks;
    const i64 b = unit / p.kv_heads, kv_head = unit % p.kv_heads;
    Arena measure(nullptr);
    layout(measure);
    Arena arena(thread_scratch(measure.used()));
    const Scratch s = layout(arena);
    FlushScope flush;

    Scorer<Acc> scorers[kMaxRows];  // of the heads of the group
    for (i64 g = 0; g < p.group(); ++g) scorers[g] = Scorer<Acc>(p, b, kv_head * p.group() + g);
    const BatchGeometry& geometry = scorers[0].geometry;
    const i64 origin = index * chunk;
    const QueryRows all{b, kv_head * p.group(), p.group(), 0, p.query_length};
    const Interval seen = visible_columns(p, geometry, all, origin, smaller(chunk, p.key_length - origin));

    for (i64 r = 0; r < rows; ++r) s.maximum[r] = -kInfinity<Acc>, s.sum[r] = 0;
    std::memset(s.accumulator, 0, rows * value_width * sizeof(Acc));
    if (!seen.empty()) {
      const Interval keys{round_down(seen.low, kLane), seen.high};
      load_queries(scorers, s);
      multiply_keys(b, kv_head, origin, keys, s);
      for (i64 r = 0; r < rows; ++r) softmax(scorers[r / p.query_length], r, origin, keys, s);
      multiply_values(b, kv_head, origin, keys, s);
      if (!all_finite(s.accumulator, rows * value_width)) repair(scorers, b, kv_head, origin, keys, s);
    }
    if (chunks == 1) return finish(scorers, s);

    for (i64 r = 0; r < rows; ++r) {
      Acc* const mine = partial(unit, index, r);
      std::memcpy(mine, s.accumulator + r * value_width, value_width * sizeof(Acc));
      mine[value_width] = s.maximum[r];
      mine[value_width + 1] = s.sum[r];
    }
    if (__atomic_add_fetch(arrived.data() + unit, 1, __ATOMIC_ACQ_REL) < chunks) return;
    for (i64 r = 0; r < rows; ++r) join(unit, r, scorers[r / p.query_length].factor, s);
    finish(scorers, s);
  }

  void finish(const Scorer<Acc>* scorers, const Scratch& s) const {
    for (i64 r = 0; r < rows; ++r)
      finish_row(scorers[r / p.query_length], o, r % p.query_length, s.maximum[r], s.sum[r],
                 s.accumulator + r * value_width, value_width);
  }

  void join(i64 unit, i64 r, Acc factor, const Scratch& s) const {
    Acc top = -kInfinity<Acc>;
    for (i64 c = 0; c < chunks; ++c) top = larger(top, partial(unit, c, r)[value_width]);
    Acc sum = 0;
    Acc* const acc = s.accumulator + r * value_width;
    std::memset(acc, 0, value_width * sizeof(Acc));
    for (i64 c = 0; c < chunks; ++c) {
      const Acc* const part = partial(unit, c, r);
      if (part[value_width + 1] == 0) continue;  // no visible key; a NaN goes on
      const Acc top_of_part = part[value_width] == -kInfinity<Acc> ? Acc(0) : part[value_width];
      const Acc shrink = top_of_part == top ? Acc(1) : exp2(splat((top_of_part - top) * factor))[0];
      sum += part[value_width + 1] * shrink;
      for (i64 d = 0; d < value_width; d += kLane) store(acc + d, load(acc + d) + load(part + d) * shrink);
    }
    s.maximum[r] = top;
    s.sum[r] = sum;
  }

  void load_queries(const Scorer<Acc>* scorers, const Scratch& s) const {
    std::memset(s.query, 0, rows * width * sizeof(Acc));
    for (i64 r = 0; r < rows; ++r) {
      const Scorer<Acc>& scorer = scorers[r / p.query_length];
      RowSource<Acc>(p.query, scorer.b, scorer.h)
          .rotated(p.query_cos, p.query_sin, scorer.geometry.offset, p.interleaved)
          .load(r % p.query_length, s.query + r * width);
    }
    if (s.operands) to_operand<Dots>(s.query, rows * width, s.operands, 0);
  }

  // Rows of keys or values in whole vectors of T, `stride` apart: in place, or kTile of them as numbers in the buffer.
  template <class T>
  struct Rows {
    const T* data;
    i64 stride;
    i64 ahead = 0;  // elements from a row to the one that is fetched while it is read

    FASTATTN_INLINE void fetch(const T* number) const {
      if constexpr (kAheadBytes > 0) __builtin_prefetch(number + ahead);
    }
  };

  template <class T>
  static Rows<T> in_place(const void* data, i64 stride, i64 columns) {
    return {static_cast<const T*>(data), stride, larger(kAheadBytes / (columns * i64{sizeof(T)}), i64{1}) * stride};
  }

  template <class Use>
  void with_rows(const RowSource<Acc>& source, i64 first, i64 count, i64 width, Acc* buffer, const Use& use) const {
    if (source.column_stride == 1 && !source.cosine && source.columns == width) {
      const char* const data = source.data + first * source.row_stride * element_size(source.dtype);
      constexpr DType own = sizeof(Acc) == 8 ? DType::kFloat64 : DType::kFloat32;
      if (source.dtype == own) return use(in_place<Acc>(data, source.row_stride, width));
      if constexpr (sizeof(Acc) == 4) {
        if (source.dtype == DType::kBFloat16) return use(in_place<BFloat16>(data, source.row_stride, width));
        if (kLoadsHalf && source.dtype == DType::kFloat16) return use(in_place<Half>(data, source.row_stride, width));
      }
    }
    for (i64 j = 0; j < count; ++j) {
      Acc* const row = buffer + j * width;
      source.load(first + j, row);
      for (i64 d = source.columns; d < width; ++d) row[d] = 0;
    }
    use(Rows<Acc>{buffer, width});
  }

  // All rows of queries in blocks of kRowBlock, then two, then one.
  template <class Body>
  FASTATTN_INLINE void in_blocks(const Body& body) const {
    i64 r = 0;
    for (; r + kRowBlock <= rows; r += kRowBlock) body(std::integral_constant<int, kRowBlock>{}, r);
    if constexpr (kRowBlock > 2)
      for (; r + 2 <= rows; r += 2) body(std::integral_constant<int, 2>{}, r);
    for (; r < rows; ++r) body(std::integral_constant<int, 1>{}, r);
  }

  // scores[r][j] = q_r . k_j
  void multiply_keys(i64 b, i64 kv_head, i64 origin, Interval keys, const Scratch& s) const {
    const RowSource<Acc> source = RowSource<Acc>(p.key, b, kv_head).rotated(p.key_cos, p.key_sin, 0, p.interleaved);
    for (i64 j = keys.low; j < keys.high; j += kTile) {
      const i64 count = smaller(kTile, keys.high - j);
      with_rows(source, origin + j, count, width, s.tile, [&](auto k) __attribute__((always_inline)) {
        in_blocks([&](auto block, i64 r) __attribute__((always_inline)) {
          if constexpr (std::is_same_v<decltype(k), Rows<BFloat16>> && Dots::kPair == 2)
            if (s.operands) return scores_of<block.value, Dots>(k, s.operands, count, r, j, s);
          scores_of<block.value, PlainMode<Acc>>(k, s.query, count, r, j, s);
        });
      });
    }
  }

  template <int kRows, class Mode, class T>
  FASTATTN_INLINE void scores_of(Rows<T> k, const typename Mode::A* queries, i64 count, i64 r, i64 first,
                                 const Scratch& s) const {
    using B = typename Mode::B;
    constexpr int kKeys = static_cast<int>(kLane) / kRows;
    constexpr i64 kStep = kLane * Mode::kPair;
    const typename Mode::A* const query = queries + r * width;
    for (i64 j = 0; j < count; j += kKeys) {
      const T* key[kKeys];
#pragma GCC unroll 16
      for (int n = 0; n < kKeys; ++n) key[n] = k.data + smaller(j + n, count - 1) * k.stride;
      Vec<Acc> sum[kLane] = {};
      const auto add = [&](int begin, int end, i64 d) __attribute__((always_inline)) {
        Vec<B> q[kRows];
#pragma GCC unroll 4
        for (int m = 0; m < kRows; ++m) q[m] = load(reinterpret_cast<const B*>(query + m * width + d));
#pragma GCC unroll 16
        for (int n = begin; n < end; ++n) {
          Vec<B> x;
          if constexpr (Mode::kPair == 2)
            x = load(reinterpret_cast<const B*>(key[n] + d));
          else
            x = load_numbers(key[n] + d);
          k.fetch(key[n] + d);
#pragma GCC unroll 4
          for (int m = 0; m < kRows; ++m) sum[m * kKeys + n] = multiply_add_lanes<Mode>(x, q[m], sum[m * kKeys + n]);
        }
      };
      if constexpr (kAheadBytes > 0) {
        for (i64 d = 0; d < width; d += kStep) add(0, kKeys, d);
      } else {  // key by key: memory in its own order, which the hardware's prefetcher follows
#pragma GCC unroll 16
        for (int n = 0; n < kKeys; ++n)
          for (i64 d = 0; d < width; d += kStep) add(n, n + 1, d);
      }
      Acc sums[kLane];
      store(sums, add_lanes<Acc>(sum));
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m)
        std::memcpy(s.scores + (r + m) * chunk + first + j, sums + m * kKeys, kKeys * sizeof(Acc));
    }
  }

  void softmax(const Scorer<Acc>& scorer, i64 r, i64 origin, Interval keys, const Scratch& s) const {
    const i64 i = r % p.query_length, end = round_up(keys.high, kLane);
    Acc* const score = s.scores + r * chunk;
    const Interval live = scorer.apply(i, origin, keys.low, end, score, s.temp, nullptr);
    if (live.low < live.high) {
      const Acc top = row_max(score, live.low, live.high);
      const Acc reference = top == -kInfinity<Acc> ? Acc(0) : top;
      s.maximum[r] = top;
      s.sum[r] = scorer.plain
                     ? reduce_add<Acc>(row_exp<true, 5>(score, live.low, live.high, reference, scorer.factor))
                     : reduce_add<Acc>(row_exp<false, 5>(score, live.low, live.high, reference, scorer.factor));
      if (p.dropout_p > 0) {
        scorer.dropout_factors(i, origin, live.low, live.high, s.temp);
        for (i64 j = live.low; j < live.high; ++j) score[j] *= s.temp[j];
      }
    }
    for (i64 j = keys.low; j < live.low; ++j) score[j] = 0;
    for (i64 j = live.high; j < end; ++j) score[j] = 0;
  }

  // accumulator[r] += weights[r] . values
  void multiply_values(i64 b, i64 kv_head, i64 origin, Interval keys, const Scratch& s) const {
    const RowSource<Acc> source(p.value, b, kv_head);
    for (i64 j = keys.low; j < keys.high; j += kTile) {
      const i64 count = smaller(kTile, keys.high - j);
      with_rows(source, origin + j, count, value_width, s.tile, [&](auto v) __attribute__((always_inline)) {
        in_blocks([&](auto block, i64 r) __attribute__((always_inline)) {
          constexpr int kColumns = smaller(2 * kVectors, kSums / block.value);
          i64 d = 0;
          for (; d + kColumns * kLane <= value_width; d += kColumns * kLane)
            columns_of<block.value, kColumns>(v, count, r, j, d, s);
          for (; d + kVectors * kLane <= value_width; d += kVectors * kLane)
            columns_of<block.value, kVectors>(v, count, r, j, d, s);
          for (; d < value_width; d += kLane) columns_of<block.value, 1>(v, count, r, j, d, s);
        });
      });
    }
  }

  template <int kRows, int kColumns, class T>
  FASTATTN_INLINE void columns_of(Rows<T> v, i64 count, i64 r, i64 first, i64 d, const Scratch& s) const {
    const Acc* const weights = s.scores + r * chunk + first;
    Acc* const acc = s.accumulator + r * value_width + d;
    // two vectors of bfloat16 at a time: their even columns and their odd ones
    constexpr bool kSplit = std::is_same_v<T, BFloat16> && kColumns % 2 == 0;
    Vec<Acc> sum[kRows][kColumns];
    for (int m = 0; m < kRows; ++m)
      for (int n = 0; n < kColumns; ++n) sum[m][n] = load(acc + m * value_width + n * kLane);
    if constexpr (kSplit)
      for (int m = 0; m < kRows; ++m)
        for (int n = 0; n < kColumns; n += 2) deinterleave<Acc>(sum[m][n], sum[m][n + 1]);
    const T* value = v.data + d;
    for (i64 j = 0; j < count; ++j, value += v.stride) {
      Vec<Acc> x[kColumns];
#pragma GCC unroll 8
      for (int n = 0; n < kColumns; ++n) {
        if constexpr (!kSplit)
          x[n] = load_numbers(value + n * kLane);
        else if (n % 2 == 0)
          load_even_and_odd(value + n * kLane, x[n], x[n + 1]);
        v.fetch(value + n * kLane);
      }
      if (kAheadBytes == 0 && d == 0)  // the columns of the passes to come, while memory is being read in order
        for (i64 n = kColumns * kLane; n < value_width; n += 64 / static_cast<i64>(sizeof(T)))
          __builtin_prefetch(value + n);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) {
        const Acc weight = weights[m * chunk + j];
#pragma GCC unroll 8
        for (int n = 0; n < kColumns; ++n) sum[m][n] += x[n] * weight;
      }
    }
    for (int m = 0; m < kRows; ++m) {
      Acc* const to = acc + m * value_width;
      if constexpr (kSplit)
        for (int n = 0; n < kColumns; n += 2)
          interleave<Acc>(sum[m][n], sum[m][n + 1], to + n * kLane, to + (n + 1) * kLane);
      else
        for (int n = 0; n < kColumns; ++n) store(to + n * kLane, sum[m][n]);
    }
  }

  // The accumulators again, pair by pair, where one came out NaN or infinite: a weight of 0 times a hidden value that
  // is not finite must not count.
  void repair(const Scorer<Acc>* scorers, i64 b, i64 kv_head, i64 origin, Interval keys, const Scratch& s) const {
    const RowSource<Acc> source(p.value, b, kv_head);
    std::memset(s.accumulator, 0, rows * value_width * sizeof(Acc));
    for (i64 j = keys.low; j < keys.high; ++j) {
      source.load(origin + j, s.temp);
      for (i64 r = 0; r < rows; ++r) {
        if (!scorers[r / p.query_length].visible(r % p.query_length, origin + j)) continue;
        const Acc weight = s.scores[r * chunk + j];
        Acc* const acc = s.accumulator + r * value_width;
        for (i64 d = 0; d < p.value_dim; ++d) acc[d] += weight * s.temp[d];
      }
    }
  }
};

}  // namespace fastattn::cpu::FASTATTN_ISA
