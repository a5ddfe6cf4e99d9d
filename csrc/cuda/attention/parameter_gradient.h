// Gradients of a dense bias and of the inner entries of the distance table: sums of dS over what they broadcast over.
//
// A block owns a tile of the bias and loops over the tiles of dS that broadcast onto it; or it owns a block diagonal of
// the score matrix, on which all tiles have one pattern of distances, and sums its diagonals once at the end.  Memory
// is that of the result and nothing is added up by atomics.  Head dimensions are walked in steps of 64 columns, so one
// kernel serves them all.
#pragma once

#include "score_gradient.h"
#include "tiles.h"

namespace fastattn::cuda {

template <class T_>
struct ParameterConfig {
  using T = T_;
  static constexpr int kSize = ParameterTiles::kSize, kThreads = ParameterTiles::kThreads;
  using StepTile = Tile<kSize, 64>;
  static_assert(4 * StepTile::kBytes == ParameterTiles::kSharedBytes);
};

// s += A B^T of two (64, dim) operands, 64 columns at a time.
template <class Config>
FASTATTN_DEVICE void add_wide_product(float (&s)[1][8][4], const Operand& a, const uint16_t* rows, int valid_rows,
                                      const Operand& b, const uint16_t* keys, int valid_keys, int dim, bool careful) {
  using T = typename Config::T;
  using StepTile = typename Config::StepTile;
  constexpr int kThreads = Config::kThreads;
  const int steps = (dim + 63) / 64;
  const auto copy_step = [&](int n) {
    if (n < steps) {
      const SharedAddress to = shared_base() + (n & 1) * 2 * StepTile::kBytes;
      copy_tile<StepTile, kThreads>(to, rows + 64 * n, a.row, valid_rows, dim - 64 * n);
      copy_tile<StepTile, kThreads>(to + StepTile::kBytes, keys + 64 * n, b.row, valid_keys, dim - 64 * n);
    }
    copy_async_commit();
  };
  copy_step(0);
  for (int n = 0; n < steps; ++n) {
    const SharedAddress row_tile = shared_base() + (n & 1) * 2 * StepTile::kBytes;
    const SharedAddress key_tile = row_tile + StepTile::kBytes;
    copy_step(n + 1);
    copy_async_wait<1>();
    if (careful) zero_non_finite<T, StepTile, kThreads>(key_tile);
    sync_block();
    add_product<T, StepTile, StepTile>(s, row_tile, warp_index() * 16, key_tile);
    sync_block();
  }
  copy_async_wait<0>();
}

// acc += dS of the tile at rows m0 ... and keys n0 ...
template <class Config>
FASTATTN_DEVICE void add_score_gradient(float (&acc)[1][8][4], const ParameterParams& params, int b, int h, int m0,
                                        int n0) {
  const Attention& p = params.attention;
  const Interval interval = interval_of(p, b);
  const int first = m0 + interval.offset;
  const int last = smaller(m0 + Config::kSize, p.query_length) - 1 + interval.offset;
  Range keys = keys_of_queries(p, interval, first, last);
  narrow(keys, p, p.key_spans, b, h, 1, m0, last - interval.offset);
  if (n0 >= keys.hi || n0 + Config::kSize <= keys.lo) return;
  const bool masked = m0 + Config::kSize > p.query_length || needs_masks(keys, n0, n0 + Config::kSize);
  const bool careful = needs_care(p, masked);
  const int rows = p.query_length - m0, columns = p.key_length - n0;
  const auto at_row = [](const Operand& x, int b, int h, int row) {
    return static_cast<const uint16_t*>(x.data) + b * x.batch + h * x.head + row * x.row;
  };
  float s[1][8][4], ds[1][8][4];
  clear(s);
  add_wide_product<Config>(s, p.query, at_row(p.query, b, h, m0), rows, p.key, at_row(p.key, b, h / p.group, n0),
                           columns, p.head_dim, careful);
  const Place<> at{m0 + warp_index() * 16 + lane_index() / 4, n0 + 2 * (lane_index() & 3), b, h};
  finish_scores(s, p, interval, at, masked, sides_of(p, first, last, n0, n0 + Config::kSize));
  clear(ds);
  add_wide_product<Config>(ds, params.grad_out, at_row(params.grad_out, b, h, m0), rows, p.value,
                           at_row(p.value, b, h / p.group, n0), columns, p.value_dim, careful);
  RowStatistics statistics[2];
  FASTATTN_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int i = at.row_at(0, 2 * half);
    const i64 row = (static_cast<i64>(b) * p.heads + h) * p.query_length + i;
    const bool inside = i < p.query_length;
    statistics[half].largest = inside ? load_constant(params.statistics + 2 * row) : 0.0f;
    statistics[half].log_sum = inside ? load_constant(params.statistics + 2 * row + 1) : infinity();
    statistics[half].delta = inside ? load_constant(params.delta + row) : 0.0f;
  }
  weights_and_gradient(s, ds, p, at, careful, [&](int, int, int r) { return statistics[r / 2]; });
  each(acc, [&](float& x, int band, int n, int r) { x += ds[band][n][r]; });
}

FASTATTN_DEVICE void store_bias(void* bias, Element element, i64 at, float x) {
  switch (element) {
    case Element::kFloat16:
      return store_global(static_cast<uint16_t*>(bias) + at, pack1<Half>(x));
    case Element::kBFloat16:
      return store_global(static_cast<uint16_t*>(bias) + at, pack1<BFloat16>(x));
    default:
      return store_global(static_cast<float*>(bias) + at, x);
  }
}

// The block's accumulators in shared memory, as rows of 65 numbers (so that a column is free of bank conflicts).
FASTATTN_DEVICE void spread(const float (&acc)[1][8][4]) {
  sync_block();
  FASTATTN_UNROLL
  for (int n = 0; n < 8; ++n) {
    FASTATTN_UNROLL
    for (int r = 0; r < 4; ++r) {
      const int row = warp_index() * 16 + lane_index() / 4 + 8 * (r / 2);
      const int column = 8 * n + 2 * (lane_index() & 3) + r % 2;
      store_shared(shared_base() + 4 * (row * 65 + column), acc[0][n][r]);
    }
  }
  sync_block();
}

FASTATTN_DEVICE float spread_value(int row, int column) {
  return load_shared<float>(shared_base() + 4 * (row * 65 + column));
}

template <class Config>
FASTATTN_DEVICE void store_bias_tile(const float (&acc)[1][8][4], const ParameterParams& params, i64 bh, int tile_m,
                                     int tile_n) {
  const Attention& p = params.attention;
  const int rows = params.one_row ? 1 : p.query_length, columns = params.one_column ? 1 : p.key_length;
  const i64 base = bh * rows * columns;
  spread(acc);
  if (params.one_row && params.one_column) {
    if (thread_index() < 64) {
      float sum = 0.0f;
      for (int c = 0; c < 64; ++c) sum += spread_value(thread_index(), c);
      store_shared(shared_base() + 4 * (thread_index() * 65 + 64), sum);
    }
    sync_block();
    if (thread_index() == 0) {
      float sum = 0.0f;
      for (int r = 0; r < 64; ++r) sum += spread_value(r, 64);
      store_bias(params.dbias, params.element, base, sum);
    }
  } else if (params.one_row || params.one_column) {
    const int at = (params.one_row ? tile_n : tile_m) * 64 + thread_index();
    if (thread_index() < 64 && at < (params.one_row ? columns : rows)) {
      float sum = 0.0f;
      for (int x = 0; x < 64; ++x)
        sum += params.one_row ? spread_value(x, thread_index()) : spread_value(thread_index(), x);
      store_bias(params.dbias, params.element, base + at, sum);
    }
  } else {
    for (int x = thread_index(); x < 64 * 64; x += Config::kThreads) {
      const int i = tile_m * 64 + x / 64, j = tile_n * 64 + x % 64;
      if (i < rows && j < columns)
        store_bias(params.dbias, params.element, base + static_cast<i64>(i) * columns + j,
                   spread_value(x / 64, x % 64));
    }
  }
}

template <class Config>
FASTATTN_DEVICE void attention_parameter_gradient(const ParameterParams& params) {
  const Attention& p = params.attention;
  float acc[1][8][4];
  clear(acc);
  int at = block_index();
  const auto next = [&](int size) {
    const int x = at % size;
    at /= size;
    return x;
  };
  if (params.dbias) {
    const int tile_n = next(params.grad_columns), tile_m = next(params.grad_rows);
    const int grad_h = next(params.grad_heads), grad_b = at;
    for (int b = 0; b < params.sum_batch; ++b)
      for (int h = 0; h < params.sum_heads; ++h)
        for (int m = 0; m < params.sum_rows; ++m)
          for (int n = 0; n < params.sum_columns; ++n)
            add_score_gradient<Config>(acc, params, grad_b + b, grad_h + h, (tile_m + m) * 64, (tile_n + n) * 64);
    store_bias_tile<Config>(acc, params, static_cast<i64>(grad_b) * params.grad_heads + grad_h, tile_m, tile_n);
    return;
  }
  const int split = next(params.splits), diagonal = params.first_diagonal + next(params.diagonals);
  const int h = next(p.heads), apart = at;
  for (int b = 0; b < params.sum_batch; ++b)
    for (int m = larger(0, -diagonal) + split; m < smaller(params.rows, params.columns - diagonal); m += params.splits)
      add_score_gradient<Config>(acc, params, apart + b, h, m * 64, (m + diagonal) * 64);
  spread(acc);
  // diagonal x of the tile holds column - row = x - 63
  float sum = 0.0f;
  for (int row = 0; row < 64; ++row) {
    const int column = row + thread_index() - 63;
    if (column >= 0 && column < 64) sum += spread_value(row, column);
  }
  store_global(params.partial_diagonals + static_cast<i64>(block_index()) * ParameterTiles::kDiagonals + thread_index(),
               sum);
}

}  // namespace fastattn::cuda
