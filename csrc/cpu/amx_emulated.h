// What the tile instructions do, for processors without them: FASTATTN_EMULATE_AMX, in `make emulate` alone.
//
// Sums are the instruction's own (Intel's manual, TDPBF16PS): the products of even and of odd elements of the depth
// each from zero, then both, then what was there.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) fastattn::cpu::FASTATTN_ISA::emulated_tiles().configure(config)
#define _tile_release() fastattn::cpu::FASTATTN_ISA::emulated_tiles().release()
#define _tile_zero(tile) fastattn::cpu::FASTATTN_ISA::emulated_tiles().zero(tile)
#define _tile_loadd(tile, from, stride) fastattn::cpu::FASTATTN_ISA::emulated_tiles().load(tile, from, stride)
#define _tile_stored(tile, to, stride) fastattn::cpu::FASTATTN_ISA::emulated_tiles().store(tile, to, stride)
#define _tile_dpbf16ps(sum, a, b) fastattn::cpu::FASTATTN_ISA::emulated_tiles().multiply(sum, a, b)

namespace fastattn::cpu::FASTATTN_ISA {

// The registers of one thread, each 16 rows of 64 bytes.  A processor faults where they are not configured; so does
// this.
class EmulatedTiles {
 public:
  void configure(const void*) { configured_ = true; }
  void release() { configured_ = false; }

  void zero(int tile) { std::memset(rows(tile), 0, sizeof tiles_[0]); }
  void load(int tile, const void* from, int64_t stride) {
    Row* const row = rows(tile);
    for (int r = 0; r < 16; ++r) std::memcpy(row[r], static_cast<const char*>(from) + r * stride, 64);
  }
  void store(int tile, void* to, int64_t stride) {
    const Row* const row = rows(tile);
    for (int r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(to) + r * stride, row[r], 64);
  }
  void multiply(int sum, int a, int b) {
    const Row *const left = rows(a), *const right = rows(b);
    Row* const result = rows(sum);
    const __m512i odd_half = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
    for (int m = 0; m < 16; ++m) {
      __m512 even = _mm512_setzero_ps(), odd = even;
      for (int k = 0; k < 16; ++k) {
        const __m512i x = _mm512_set1_epi32(static_cast<int>(left[m][k])), y = _mm512_loadu_si512(right[k]);
        even = _mm512_fmadd_ps((__m512)_mm512_slli_epi32(x, 16), (__m512)_mm512_slli_epi32(y, 16), even);
        odd = _mm512_fmadd_ps((__m512)_mm512_and_si512(x, odd_half), (__m512)_mm512_and_si512(y, odd_half), odd);
      }
      _mm512_storeu_ps(result[m], _mm512_add_ps(_mm512_loadu_ps(result[m]), _mm512_add_ps(even, odd)));
    }
  }

 private:
  using Row = uint32_t[16];

  Row* rows(int tile) {
    if (!configured_) __builtin_trap();
    return tiles_[tile];
  }

  bool configured_ = false;
  Row tiles_[8][16];
};

inline EmulatedTiles& emulated_tiles() {
  static thread_local EmulatedTiles tiles;
  return tiles;
}

}  // namespace fastattn::cpu::FASTATTN_ISA
