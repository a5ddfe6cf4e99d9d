// Which tiles of query rows a block computes, and what it knows of each: the same arithmetic in the producer, in the
// checkers and in every consumer, so that nobody has to tell the others.
//
// A block per multiprocessor stays for the whole launch.  Round i gives tile i * blocks + block to each block, and odd
// rounds run backwards: with the longest rows of a causal mask first, whoever got the longest tile of one round gets
// the shortest of the next, and the sums differ by no more than one round's difference.
#pragma once

#include "../attention/scores.h"
#include "params.h"

namespace fastattn::cuda {

struct QueryRows {
  RowContext context;  // its head is the first of those that share the tile
  int m0;              // first query
  int start, end;      // tiles of keys
};

// The t-th in order: a tile of a head, and which batch and head.
FASTATTN_DEVICE void place_of(const Schedule& order, int t, int& tile, int& pair) {
  const int whole = order.section * order.tiles, first = t / whole * order.section, rest = t % whole;
  const int pairs = smaller(order.section, order.pairs - first);
  tile = rest / pairs;
  pair = first + rest % pairs;
  if (order.longest_first) tile = order.tiles - 1 - tile;
}

template <class Config>
FASTATTN_DEVICE QueryRows query_rows(const Schedule& order, const Attention& p, const Packing& packing, int t) {
  int tile, pair;
  place_of(order, t, tile, pair);
  QueryRows rows;
  const int queries = Config::kRows / 64 * packing.queries;
  rows.m0 = tile * queries;
  rows.context = row_context<Config::kPlain>(p, pair / packing.packs, pair % packing.packs * packing.heads,
                                             packing.heads, rows.m0, rows.m0 + queries - 1);
  const Range& keys = rows.context.keys;
  rows.start = larger(keys.lo, 0) / Config::kKeys;
  rows.end = keys.hi > 0 ? (keys.hi + Config::kKeys - 1) / Config::kKeys : 0;
  return rows;
}

// Calls f(tile) for the tiles of this block, in order.
template <class F>
FASTATTN_DEVICE void for_own_tiles(const Schedule& order, F f) {
  const int blocks = grid_size();
  // from a round that runs forwards to one that runs backwards, and then what is left of two rounds
  const auto step = [&](int t) { return t / blocks & 1 ? 2 * block_index() + 1 : 2 * (blocks - block_index()) - 1; };
  FASTATTN_NO_UNROLL
  for (int t = block_index(); t < order.total; t += step(t)) f(t);
}

// Calls f(QueryRows) for the tiles of query rows of this block.
template <class Config, class F>
FASTATTN_DEVICE void for_own_rows(const Schedule& order, const Attention& p, const Packing& packing, F f) {
  for_own_tiles(order, [&](int t) { f(query_rows<Config>(order, p, packing, t)); });
}

template <class Config, class F>
FASTATTN_DEVICE void for_own_rows(const Schedule& order, const Attention& p, F f) {
  for_own_rows<Config>(order, p, Packing{1, 64, 1 << 16, p.heads}, f);
}

// Whether a tile of keys needs a look at single elements.
template <class Config>
FASTATTN_DEVICE bool masks_at(const RowContext& context, int n) {
  return needs_masks(context.keys, n * Config::kKeys, (n + 1) * Config::kKeys);
}

// Whether its values are looked at before they are used (needs_care of scores.h).
template <class Config>
FASTATTN_DEVICE bool checked_at(const Attention& p, const RowContext& context, int n) {
  return masks_at<Config>(context, n) || (!Config::kPlain && p.bias.data);
}

}  // namespace fastattn::cuda
