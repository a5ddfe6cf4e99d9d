// Tensor core instructions of a warp (sm_80): ldmatrix and mma.sync m16n8k16.
//
// Fragments, for lane l with g = l / 4 and t = l % 4 (PTX manual, "Matrix fragments for mma.m16n8k16"):
//   A (16 x 16), four registers of two neighbouring columns:
//     a[0] = (g, 2t), a[1] = (g + 8, 2t), a[2] = (g, 2t + 8), a[3] = (g + 8, 2t + 8)
//   B (16 x 8), two registers of two neighbouring rows:  b0 = (2t, g), b1 = (2t + 8, g)
//   D (16 x 8), four numbers:  d[0], d[1] = (g, 2t), (g, 2t + 1); d[2], d[3] = the same of row g + 8
// so D of two neighbouring n tiles, packed pairwise, is the A of the next product.
#pragma once

#include "memory.h"

namespace fastattn::cuda {

// Four 8 x 8 matrices of 16-bit elements: lane l gives the address (a multiple of 16) of row l % 8 of matrix l / 8, and
// gets in r[i] the two elements of matrix i at (l / 4, 2 (l % 4)); transposed: at (2 (l % 4), l / 4) and the row below.
FASTATTN_DEVICE void load_matrix_x4(uint32_t (&r)[4], SharedAddress row FASTATTN_WHERE) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
#else
  sim::load_matrix(r, 4, /*transposed=*/false, row, where);
#endif
}

FASTATTN_DEVICE void load_matrix_x4_transposed(uint32_t (&r)[4], SharedAddress row FASTATTN_WHERE) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
#else
  sim::load_matrix(r, 4, /*transposed=*/true, row, where);
#endif
}

// Two matrices: addresses come from lanes 0 to 15, those of the others are not used.
FASTATTN_DEVICE void load_matrix_x2(uint32_t (&r)[2], SharedAddress row FASTATTN_WHERE) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row)
               : "memory");
#else
  sim::load_matrix(r, 2, /*transposed=*/false, row, where);
#endif
}

FASTATTN_DEVICE void load_matrix_x2_transposed(uint32_t (&r)[2], SharedAddress row FASTATTN_WHERE) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(row)
               : "memory");
#else
  sim::load_matrix(r, 2, /*transposed=*/true, row, where);
#endif
}

// d += a b, products exact, sums in float32.
template <class T>
FASTATTN_DEVICE void multiply_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 FASTATTN_WHERE) {
#ifdef __CUDACC__
  if constexpr (kIsHalf<T>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  sim::multiply_m16n8k16(d, a, b0, b1, kIsHalf<T>, where);
#endif
}

}  // namespace fastattn::cuda
