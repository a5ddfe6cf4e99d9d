// Values of 8 bits, transposed.
//
// A product of 8-bit operands takes both with the sum along their rows, so values, whose rows are keys, are turned on
// their way: ldmatrix transposes pairs of bytes, a byte permutation parts the pairs, stmatrix stores rows of a column
// each.  A register then has keys 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of 16, t = lane % 4, in its four bytes, and goes to
// bytes 4 t to 4 t + 3 of them.  Weights come out of the accumulators at the same four keys, which are bytes 4 t to
// 4 t + 3 of a left operand (pack_weights in softmax.h): keys are permuted alike on both sides, and the sum over them
// is the same.
//
// Rows that a stmatrix stores together are four even and four odd columns, so that they fall into eight different
// groups of banks.
#pragma once

#include "block.h"

namespace fastattn::cuda {

// The highest bit of each byte that is a NaN.
FASTATTN_DEVICE uint32_t nan_bytes(uint32_t four) { return ((four & 0x7F7F7F7Fu) + 0x01010101u) & 0x80808080u; }

// This warp's share of a tile: 16 keys at a time.  kCareful: NaN becomes zero, and `checks` says which keys had one.
template <class Config, bool kCareful>
FASTATTN_DEVICE void transpose_keys(SharedAddress from, SharedAddress to, SharedAddress checks, int checker) {
  using KeyTile = typename Config::KeyTile;
  using ValueTile = typename Config::ValueTile;
  constexpr int kColumns = 32, kSteps = Config::kDim == 64 ? 2 : 4;  // of an instruction; whose latencies overlap
  const int lane = lane_index(), row = lane & 7, matrix = lane >> 3;
  const uint32_t even = 0x6420, odd = 0x7531;
  const uint32_t first = lane < 16 ? even : odd, second = lane < 16 ? odd : even;
  const SharedAddress own_from = from + KeyTile::lane_part(lane & 15, lane >> 4);
  const int own_column = 16 * (matrix >> 1) + 2 * row + ((row >> 2) ^ (matrix & 1));
  bool found = false;
  FASTATTN_NO_UNROLL
  for (int keys = checker; keys < Config::kKeys / 16; keys += kCheckers) {
    uint32_t low = 0, high = 0;  // of the 16 keys: the first eight, the others
    const SharedAddress own_to = to + ValueTile::chunk(own_column, keys);
    FASTATTN_UNROLL
    for (int first_step = 0; first_step < Config::kDim / kColumns; first_step += kSteps) {
      uint32_t r[kSteps][4];
      FASTATTN_UNROLL
      for (int n = 0; n < kSteps; ++n)
        load_matrix_x4_transposed(r[n], KeyTile::at(own_from, first_step + n) + keys * 16 * KeyTile::kRowBytes);
      FASTATTN_UNROLL
      for (int n = 0; n < kSteps; ++n) {
        if constexpr (kCareful) {
          FASTATTN_UNROLL
          for (int i = 0; i < 4; ++i) {
            const uint32_t bad = nan_bytes(r[n][i]);
            (i & 1 ? high : low) |= bad;
            r[n][i] &= ~((bad >> 7) * 0xFF);
          }
        }
        const uint32_t turned[4] = {permute_bytes(r[n][0], r[n][1], first), permute_bytes(r[n][0], r[n][1], second),
                                    permute_bytes(r[n][2], r[n][3], first), permute_bytes(r[n][2], r[n][3], second)};
        store_matrix_x4(own_to + (first_step + n) * kColumns * ValueTile::kRowBytes, turned);
      }
    }
    if constexpr (kCareful) {
      FASTATTN_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) {
        low |= shuffle_xor(low, mask);
        high |= shuffle_xor(high, mask);
      }
      if (lane < 4) {
        const SharedAddress own = checks + 16 + 16 * keys + 2 * lane;
        store_shared<uint8_t>(own, (low & 0xFFFF) != 0);
        store_shared<uint8_t>(own + 1, low >> 16 != 0);
        store_shared<uint8_t>(own + 8, (high & 0xFFFF) != 0);
        store_shared<uint8_t>(own + 9, high >> 16 != 0);
      }
      found = found || (low | high) != 0;
    }
  }
  if constexpr (kCareful) {
    found = any_lane(found);
    if (lane == 0) store_shared<uint32_t>(checks + 4 * checker, found);
  }
  fence_async_shared();  // what was stored is seen by the products
}

template <class Config>
FASTATTN_DEVICE void transpose_values(SharedAddress from, SharedAddress to, SharedAddress checks, int checker,
                                      bool careful) {
  if (careful) {
    transpose_keys<Config, true>(from, to, checks, checker);
  } else {
    transpose_keys<Config, false>(from, to, checks, checker);
  }
}

}  // namespace fastattn::cuda
