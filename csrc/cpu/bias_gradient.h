// The gradient of a dense bias that is broadcast over the batch, the heads, the queries or the keys.
//
// A work item owns a rectangle of the bias and loops over everything that shares it, so that nothing larger than the
// bias is ever stored and every element has one order of summation.  It recomputes S and dP (two more products than
// the main pass): the price of not holding a (B, H, Sq, Sk) array.
#pragma once

#include "gradient_tile.h"

namespace fastattn::cpu::FASTATTN_ISA {

template <class Mode>
class BiasGradient {
 public:
  using Acc = typename Mode::Acc;
  using Tile = GradientTile<Mode>;

  BiasGradient(const Tile& tile, const View& gradient) : engine(tile), p(tile.p), out(gradient) {
    own_batch = out.size[0] == p.batch;
    own_head = out.size[1] == p.query_heads;
    own_rows = out.size[2] == p.query_length;
    own_columns = out.size[3] == p.key_length;
    row_blocks = own_rows ? larger(ceil_div(p.query_length, kRows), i64{1}) : 1;
    column_blocks = own_columns ? larger(ceil_div(p.key_length, engine.tile), i64{1}) : 1;
  }

  i64 items() const {
    i64 count = row_blocks * column_blocks;
    return count * out.size[0] * out.size[1];
  }

  static void run_item(void* self, i64 index) { static_cast<const BiasGradient*>(self)->run(index); }

 private:
  static constexpr i64 kRows = 512;

  const Tile& engine;
  const Problem& p;
  const View& out;
  bool own_batch, own_head, own_rows, own_columns;
  i64 row_blocks, column_blocks;

  struct Scratch {
    typename Tile::Scratch tile;
    Acc* sum;  // (rows of the block or 1, columns of the tile or 1)
  };

  Scratch layout(Arena& arena) const {
    Scratch s;
    s.tile = engine.layout(arena);
    s.sum = arena.take<Acc>((own_rows ? smaller(kRows, p.query_length) : 1) * (own_columns ? engine.tile : 1));
    return s;
  }

  void run(i64 index) const {
    const i64 column_block = index % column_blocks, row_block = index / column_blocks % row_blocks;
    const i64 h = index / column_blocks / row_blocks % out.size[1];
    const i64 b = index / column_blocks / row_blocks / out.size[1];
    Arena measure(nullptr);
    layout(measure);
    Arena arena(thread_scratch(measure.used()));
    const Scratch s = layout(arena);
    FlushScope flush;
    TileScope<Mode> tiles;

    const i64 first = own_rows ? row_block * kRows : 0;
    const i64 rows = own_rows ? smaller(kRows, p.query_length - first) : p.query_length;
    const i64 first_key = own_columns ? column_block * engine.tile : 0;
    const i64 last_key = own_columns ? smaller(first_key + engine.tile, p.key_length) : p.key_length;
    const i64 sum_row = own_columns ? engine.tile : 1;
    std::memset(s.sum, 0, (own_rows ? rows : 1) * sum_row * sizeof(Acc));

    for (i64 batch = own_batch ? b : 0; batch < (own_batch ? b + 1 : p.batch); ++batch)
      for (i64 origin = first_key; origin < last_key; origin += engine.tile) {
        i64 packed = -1;
        typename Tile::Keys keys{};
        for (i64 head = own_head ? h : 0; head < (own_head ? h + 1 : p.query_heads); ++head) {
          if (head / p.group() != packed) {
            packed = head / p.group();
            keys = engine.pack_keys(s.tile, batch, packed, origin, smaller(engine.tile, last_key - origin));
          }
          const Scorer<Acc> scorer(p, batch, head);
          for (i64 i = first; i < first + rows; i += Tile::kRows) {
            typename Tile::Span q;
            if (!engine.span(scorer, {}, keys, i, smaller(Tile::kRows, first + rows - i), &q)) continue;
            engine.pack_queries(s.tile, scorer, &q);
            const auto add = [&](i64 row, const Acc* ds) {
              Acc* const sum = s.sum + (own_rows ? row - first : 0) * sum_row;
              const i64 end = smaller(q.end, keys.count);
              if (own_columns) {
                for (i64 j = q.begin; j < end; ++j) sum[j] += ds[j];
              } else {
                Acc total = 0;
                for (i64 j = q.begin; j < end; ++j) total += ds[j];
                sum[0] += total;
              }
            };
            engine.compute(s.tile, scorer, {}, keys, q, add, [](i64, i64) {}, [](const typename Tile::Span&) {});
          }
        }
      }
    for (i64 r = 0; r < (own_rows ? rows : 1); ++r)
      store_row(out.dtype, s.sum + r * sum_row, own_columns ? last_key - first_key : 1,
                out.mutable_at(b, h, first + r, first_key));
  }
};

template <class Mode>
inline void bias_gradient(const GradientTile<Mode>& tile, const View& gradient, const Parallel& parallel) {
  BiasGradient<Mode> kernel(tile, gradient);
  parallel.run(kernel.items(), &BiasGradient<Mode>::run_item, &kernel);
}

}  // namespace fastattn::cpu::FASTATTN_ISA
