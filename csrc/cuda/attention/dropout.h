// The dropout mask of a tile's accumulators: the function of fastattn/philox.py, element (b, h, i, j) from word j & 3
// of philox(j >> 2, i, b * Hq + h, offset).
//
// A call yields the words of four neighbouring keys, which belong to two lanes (or four, transposed): each lane makes a
// part of the calls and the words are traded by shuffles.
#pragma once

#include "../../common/philox.h"
#include "scores.h"

namespace fastattn::cuda {

struct DropoutKey {
  uint32_t key[2], offset;
};

FASTATTN_DEVICE DropoutKey dropout_key(const Attention& p) {
  const uint64_t key = static_cast<uint64_t>(load_constant(p.dropout_seed));
  return {{static_cast<uint32_t>(key), static_cast<uint32_t>(key >> 32)},
          static_cast<uint32_t>(load_constant(p.dropout_seed + 1))};
}

FASTATTN_DEVICE void words_of(const DropoutKey& seed, int key_group, int query, int batch_head, uint32_t (&words)[4]) {
  const Philox in{
      {seed.key[0], seed.key[1]},
      {static_cast<uint32_t>(key_group), static_cast<uint32_t>(query), static_cast<uint32_t>(batch_head), seed.offset}};
  philox4x32_10(in, words);
}

// Bit 4 * n + r of result[band] says whether accumulator [band][n][r] is kept.  Rows are queries; the first key of the
// tile is a multiple of 4.
template <int kBands, int kColumns, class Place>
FASTATTN_DEVICE void keep_bits(uint32_t (&bits)[kBands], const Attention& p, const Place& at) {
  static_assert(kColumns <= 8);
  const DropoutKey seed = dropout_key(p);
  const bool odd = lane_index() & 1;
  FASTATTN_UNROLL
  for (int band = 0; band < kBands; ++band) {
    bits[band] = 0;
    FASTATTN_NO_UNROLL
    for (int n = 0; n < kColumns; ++n) {
      uint32_t words[4];
      // even lanes draw for the upper row, odd ones for the lower; both hold keys of the same group of four
      const int r = odd ? 2 : 0;
      words_of(seed, at.key(band, n, 0) >> 2, at.query(band, n, r), at.batch * p.heads + at.head_at(band, r), words);
      const uint32_t first = shuffle_xor(odd ? words[0] : words[2], 1),
                     second = shuffle_xor(odd ? words[1] : words[3], 1);
      const uint32_t mine[4] = {odd ? first : words[0], odd ? second : words[1], odd ? words[2] : first,
                                odd ? words[3] : second};
      FASTATTN_UNROLL
      for (int r = 0; r < 4; ++r)
        if (mine[r] >= p.drop_below) bits[band] |= 1u << (4 * n + r);
    }
  }
}

// The same of a transposed tile, whose first key is a multiple of 8.
template <int kBands, int kColumns>
FASTATTN_DEVICE void keep_bits(uint32_t (&bits)[kBands], const Attention& p, const Place<true>& at) {
  static_assert(kColumns <= 8);
  const DropoutKey seed = dropout_key(p);
  const int batch_head = at.batch * p.heads + at.head;
  // four lanes hold four neighbouring keys; lane `part` of them draws for accumulator r = part of all four
  const int part = (lane_index() >> 2) & 3;
  FASTATTN_UNROLL
  for (int band = 0; band < kBands; ++band) {
    bits[band] = 0;
    FASTATTN_NO_UNROLL
    for (int n = 0; n < kColumns; ++n) {
      uint32_t words[4];
      words_of(seed, at.row_at(band, part) >> 2, at.column_at(n, part), batch_head, words);
      FASTATTN_UNROLL
      for (int step = 0; step < 4; ++step) {
        const int other = part ^ step;
        const uint32_t low = other & 1 ? words[1] : words[0], high = other & 1 ? words[3] : words[2];
        const uint32_t word = shuffle_xor(other & 2 ? high : low, 4 * step);
        if (word >= p.drop_below) bits[band] |= 1u << (4 * n + other);
      }
    }
  }
}

}  // namespace fastattn::cuda
