// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), keyed on positions:
// element (b, h, i, j) of the attention matrix is word j & 3 of philox(counter = (j >> 2, i, b * Hq + h, offset)).
// The mask is therefore the same whatever the tiling, the thread count or the device.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define FASTATTN_PHILOX __host__ __device__ __forceinline__
#else
#define FASTATTN_PHILOX __attribute__((always_inline)) inline
#endif

namespace fastattn {

struct Philox {
  uint32_t key[2];
  uint32_t counter[4];
};

FASTATTN_PHILOX void philox4x32_10(const Philox& in, uint32_t out[4]) {
  uint32_t c0 = in.counter[0], c1 = in.counter[1], c2 = in.counter[2], c3 = in.counter[3];
  uint32_t k0 = in.key[0], k1 = in.key[1];
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(p1);
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

#undef FASTATTN_PHILOX

}  // namespace fastattn
