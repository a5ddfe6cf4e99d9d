// Tiles of 16-bit rows in shared memory: where an element lies, how it gets there, how fragments are read.
//
// A tile of rows x D is cut into panels of 64 columns (128-byte rows), or of 32 (64-byte rows) where 64 does not divide
// D.  Inside a panel the 16-byte chunk c of row r lies at chunk c ^ swizzle(r), so that the eight rows of an 8x8 matrix
// fall into eight different groups of banks, whichever column they are read at.
#pragma once

#include "../arch/arch.h"
#include "params.h"

namespace fastattn::cuda {

template <int kRows_, int kDim_>
struct Tile {
  static constexpr int kRows = kRows_, kDim = kDim_;
  static_assert(kRows % 16 == 0 && kDim % 32 == 0);
  static constexpr int kPanelColumns = kDim % 64 == 0 ? 64 : 32;
  static constexpr int kRowBytes = 2 * kPanelColumns;
  static constexpr int kPanelBytes = kRows * kRowBytes;
  static constexpr int kBytes = kRows * kDim * 2;
  static constexpr int kChunks = kDim / 8;                // 16-byte chunks of a row
  static constexpr int kPanelSteps = kPanelColumns / 16;  // 16-column steps of a panel
  static constexpr int kPanelElements = kPanelColumns;    // what a tensor copy counts

  static FASTATTN_DEVICE int swizzle(int row) { return kPanelColumns == 64 ? row & 7 : (row >> 1) & 3; }

  // Byte offset of a chunk.
  static FASTATTN_DEVICE uint32_t chunk(int row, int column) {
    constexpr int kMask = kPanelColumns / 8 - 1;
    return static_cast<uint32_t>(column / (kMask + 1) * kPanelBytes + row * kRowBytes +
                                 ((column & kMask) ^ swizzle(row)) * 16);
  }

  // The chunk 2 * step + high of a row, as a part that depends on the lane and a part that is known at compile time:
  // `at(lane_part(row, high), step)`.
  static FASTATTN_DEVICE uint32_t lane_part(int row, int high) {
    return static_cast<uint32_t>(row * kRowBytes + ((high ^ swizzle(row)) * 16));
  }
  static FASTATTN_DEVICE uint32_t at(SharedAddress tile_and_lane, int step) {
    return (tile_and_lane ^ static_cast<uint32_t>(step % kPanelSteps * 32)) +
           static_cast<uint32_t>(step / kPanelSteps * kPanelBytes);
  }
};

// The same of rows of kDim elements of 8 bits, in pairs.
template <int kRows, int kDim>
struct ByteTile : Tile<kRows, kDim / 2> {
  static constexpr int kPanelElements = 2 * Tile<kRows, kDim / 2>::kPanelColumns;
};

// Calls f(row, panel, offset in the tile) for the chunks that one of kThreads threads takes care of.  Eight (or four)
// threads take a row of a panel, so that neighbours meet in memory; what a thread takes next lies a fixed distance on.
template <class Tile, int kThreads, class F>
FASTATTN_DEVICE void for_own_chunks(int thread, F f) {
  constexpr int kPerRow = Tile::kPanelColumns / 8;
  constexpr int kRowStep = kThreads / kPerRow;
  const int row0 = thread / kPerRow, column = thread % kPerRow;
  FASTATTN_UNROLL
  for (int n = 0; n < (Tile::kRows + kRowStep - 1) / kRowStep; ++n) {
    const int row = row0 + n * kRowStep;
    if (Tile::kRows % kRowStep != 0 && row >= Tile::kRows) break;
    // a step of eight rows leaves the swizzle as it is
    const uint32_t offset =
        kRowStep % 8 == 0 ? Tile::chunk(row0, column) + n * kRowStep * Tile::kRowBytes : Tile::chunk(row, column);
    FASTATTN_UNROLL
    for (int panel = 0; panel < Tile::kDim / Tile::kPanelColumns; ++panel)
      f(row, panel, offset + panel * Tile::kPanelBytes);
  }
}

// Starts copying rows [0, valid_rows) and columns [0, dim) of `from` into a tile; the rest becomes zero.  kThreads
// share the work, this one being `thread` of them.
template <class Tile, int kThreads>
FASTATTN_DEVICE void copy_tile(SharedAddress tile, const void* from, i64 row_stride, int valid_rows, int dim,
                               int thread = thread_index()) {
  const int column = thread % (Tile::kPanelColumns / 8) * 8;
  const char* bytes = static_cast<const char*>(from) + column * 2;
  for_own_chunks<Tile, kThreads>(thread, [&](int row, int panel, uint32_t offset) {
    copy_async_16(tile + offset, bytes + row * row_stride * 2 + panel * Tile::kRowBytes,
                  row < valid_rows && column + panel * Tile::kPanelColumns < dim);
  });
}

template <class T>
struct ExponentBits;
template <>
struct ExponentBits<Half> {
  static constexpr uint32_t kMask = 0x7C00;
};
template <>
struct ExponentBits<BFloat16> {
  static constexpr uint32_t kMask = 0x7F80;
};

// A pair of 16-bit numbers with those that are NaN or infinite zeroed.
template <class T>
FASTATTN_DEVICE uint32_t finite_or_zero(uint32_t pair) {
  constexpr uint32_t kLow = ExponentBits<T>::kMask, kHigh = kLow << 16;
  if ((pair & kLow) == kLow) pair &= 0xFFFF0000u;
  if ((pair & kHigh) == kHigh) pair &= 0x0000FFFFu;
  return pair;
}

// Zeroes what is not finite among the chunks that this thread itself copied (they must have arrived): a masked place
// must not leak through 0 * NaN.
template <class T, class Tile, int kThreads>
FASTATTN_DEVICE void zero_non_finite(SharedAddress tile) {
  for_own_chunks<Tile, kThreads>(thread_index(), [&](int, int, uint32_t offset) {
    Vec4 chunk = load_shared<Vec4>(tile + offset);
    bool changed = false;
    FASTATTN_UNROLL
    for (int n = 0; n < 4; ++n) {
      const uint32_t clean = finite_or_zero<T>(chunk.x[n]);
      changed = changed || clean != chunk.x[n];
      chunk.x[n] = clean;
    }
    if (changed) store_shared(tile + offset, chunk);
  });
}

// Whether any chunk this thread copied holds a number that is not finite.
template <class T, class Tile, int kThreads>
FASTATTN_DEVICE bool any_non_finite(SharedAddress tile) {
  bool found = false;
  for_own_chunks<Tile, kThreads>(thread_index(), [&](int, int, uint32_t offset) {
    const Vec4 chunk = load_shared<Vec4>(tile + offset);
    FASTATTN_UNROLL
    for (int n = 0; n < 4; ++n) found = found || finite_or_zero<T>(chunk.x[n]) != chunk.x[n];
  });
  return found;
}

}  // namespace fastattn::cuda
