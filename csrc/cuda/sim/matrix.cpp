#include <cstring>

#include "block.h"
#include "numbers.h"
#include "sites.h"

namespace fastattn::cuda::sim {

namespace {

void check_rounded(float value) {
  if (is_in_flight(to_bits(value))) [[unlikely]] {
    block.fail_block("a number is rounded that depends on an accumulator whose product " +
                     block.name(current_position.thread) + " did not wait for");
  }
}

}  // namespace

uint16_t round_to_16(float value, bool half) {
  check_rounded(value);
  return half ? float_to_half(value) : float_to_bfloat16(value);
}
uint8_t round_to_e4m3(float value) {
  check_rounded(value);
  return float_to_e4m3(value);
}
float widen_from_16(uint16_t value, bool half) { return half ? half_to_float(value) : bfloat16_to_float(value); }

namespace {

struct Multiply {
  float* d;
  const uint32_t* a;
  uint32_t b0, b1;
};

// d[m][n] += sum over k of a[m][k] b[k][n], k ascending.
FASTATTN_CLONES
void product(float (&d)[16][8], const uint16_t (&a)[16][16], const uint16_t (&b)[16][8], bool half) {
  float x[16][16], y[16][8];
  if (half) {
    for (int i = 0; i < 256; ++i) (&x[0][0])[i] = half_to_float((&a[0][0])[i]);
    for (int i = 0; i < 128; ++i) (&y[0][0])[i] = half_to_float((&b[0][0])[i]);
  } else {
    for (int i = 0; i < 256; ++i) (&x[0][0])[i] = bfloat16_to_float((&a[0][0])[i]);
    for (int i = 0; i < 128; ++i) (&y[0][0])[i] = bfloat16_to_float((&b[0][0])[i]);
  }
  using Row = float __attribute__((vector_size(32)));
  for (int m = 0; m < 16; m += 4) {
    Row sum[4];
    for (int i = 0; i < 4; ++i) std::memcpy(&sum[i], d[m + i], sizeof(Row));
    for (int k = 0; k < 16; ++k) {
      Row row;
      std::memcpy(&row, y[k], sizeof(Row));
      for (int i = 0; i < 4; ++i) sum[i] += x[m + i][k] * row;
    }
    for (int i = 0; i < 4; ++i) std::memcpy(d[m + i], &sum[i], sizeof(Row));
  }
}

void multiply(void** all, bool half) {
  float d[16][8];
  uint16_t a[16][16], b[16][8];
  for (int lane = 0; lane < kLanes; ++lane) {
    const auto& mine = *static_cast<const Multiply*>(all[lane]);
    const int group = lane / 4, pair = lane % 4 * 2;
    std::memcpy(&a[group][pair], &mine.a[0], 4);
    std::memcpy(&a[group + 8][pair], &mine.a[1], 4);
    std::memcpy(&a[group][pair + 8], &mine.a[2], 4);
    std::memcpy(&a[group + 8][pair + 8], &mine.a[3], 4);
    b[pair][group] = static_cast<uint16_t>(mine.b0);
    b[pair + 1][group] = static_cast<uint16_t>(mine.b0 >> 16);
    b[pair + 8][group] = static_cast<uint16_t>(mine.b1);
    b[pair + 9][group] = static_cast<uint16_t>(mine.b1 >> 16);
    std::memcpy(&d[group][pair], &mine.d[0], 8);
    std::memcpy(&d[group + 8][pair], &mine.d[2], 8);
  }
  product(d, a, b, half);
  for (int lane = 0; lane < kLanes; ++lane) {
    float* mine = static_cast<const Multiply*>(all[lane])->d;
    const int group = lane / 4, pair = lane % 4 * 2;
    std::memcpy(&mine[0], &d[group][pair], 8);
    std::memcpy(&mine[2], &d[group + 8][pair], 8);
  }
}

struct Matrices {
  uint32_t* r;
  uint32_t row;
};

constexpr int kRowBytes = 16;

// All lanes of the running warp know the same of the others.
bool share_one_time(int first) {
  for (int lane = 1; lane < kLanes; ++lane) {
    const Time &a = block.time(first), &b = block.time(first + lane);
    if (a.clock != b.clock || a.epoch != b.epoch) return false;
  }
  return true;
}

void count_rows(Access access, void** all, int matrices, uint32_t site) {
  if (!block.count()) return;
  Traffic traffic{1, matrices, 0};
  for (int matrix = 0; matrix < matrices; ++matrix) {
    uint32_t words[32];
    for (int i = 0; i < 32; ++i) {
      words[i] = static_cast<const Matrices*>(all[matrix * 8 + i / 4])->row / 4 + static_cast<uint32_t>(i % 4);
    }
    traffic.actual += wavefronts(words, 32);
  }
  block.traffics().add(site, access, traffic);
}

void load_rows(void** all, int matrices, bool transposed, Where where) {
  const int first = current_position.thread / kLanes * kLanes;
  const uint32_t site = Sites::number(where);
  const bool uniform = block.find_races() && share_one_time(first);
  for (int matrix = 0; matrix < matrices; ++matrix) {
    uint16_t rows[8][8];
    for (int i = 0; i < 8; ++i) {
      const int thread = first + matrix * 8 + i;
      const uint32_t address = static_cast<const Matrices*>(all[matrix * 8 + i])->row;
      block.check_shared(thread, address, kRowBytes, "load_matrix", where);
      block.check_readable(thread, address, kRowBytes, "load_matrix", where);
      if (block.find_races()) {
        const uint32_t at = address - kSharedBase;
        if (uniform) {
          block.check_race(thread, block.races().read_by_warp(first / kLanes, block.time(first), at, kRowBytes, site),
                           address, kRowBytes, "load_matrix", where);
        } else {
          for (int lane = 0; lane < kLanes; ++lane) {
            block.check_race(first + lane,
                             block.races().read(first + lane, block.time(first + lane), at, kRowBytes, site), address,
                             kRowBytes, "load_matrix", where);
          }
        }
      }
      std::memcpy(rows[i], block.shared(address), kRowBytes);
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      const int group = lane / 4, pair = lane % 4 * 2;
      const uint16_t low = transposed ? rows[pair][group] : rows[group][pair];
      const uint16_t high = transposed ? rows[pair + 1][group] : rows[group][pair + 1];
      static_cast<const Matrices*>(all[lane])->r[matrix] = uint32_t{low} | uint32_t{high} << 16;
    }
  }
  count_rows(Access::kMatrixLoad, all, matrices, site);
}

void store_rows(void** all, int matrices, bool transposed, Where where) {
  const int first = current_position.thread / kLanes * kLanes;
  const uint32_t site = Sites::number(where);
  for (int matrix = 0; matrix < matrices; ++matrix) {
    uint16_t rows[8][8];
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint32_t value = static_cast<const Matrices*>(all[lane])->r[matrix];
      const int group = lane / 4, pair = lane % 4 * 2;
      (transposed ? rows[pair][group] : rows[group][pair]) = static_cast<uint16_t>(value);
      (transposed ? rows[pair + 1][group] : rows[group][pair + 1]) = static_cast<uint16_t>(value >> 16);
    }
    for (int i = 0; i < 8; ++i) {
      const int thread = first + matrix * 8 + i;
      const uint32_t address = static_cast<const Matrices*>(all[matrix * 8 + i])->row;
      block.check_shared(thread, address, kRowBytes, "store_matrix", where);
      block.begin_write(thread, address, kRowBytes, "store_matrix", where);
      std::memcpy(block.shared(address), rows[i], kRowBytes);
      block.mark(address, kRowBytes, kWritten);
    }
  }
  count_rows(Access::kMatrixStore, all, matrices, site);
}

}  // namespace

void multiply_m16n8k16(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, bool half, Where where) {
  Multiply mine{d, a, b0, b1};
  block.meet(Operation::kMultiply, half, where, mine, [half](void** all) {
    ++block.report().products;
    multiply(all, half);
  });
}

void load_matrix(uint32_t* r, int matrices, bool transposed, uint32_t row, Where where) {
  Matrices mine{r, row};
  block.meet(Operation::kLoadMatrix, matrices * 2 + transposed, where, mine,
             [=](void** all) { load_rows(all, matrices, transposed, where); });
}

void store_matrix(uint32_t row, const uint32_t* r, int matrices, bool transposed, Where where) {
  Matrices mine{const_cast<uint32_t*>(r), row};
  block.meet(Operation::kStoreMatrix, matrices * 2 + transposed, where, mine,
             [=](void** all) { store_rows(all, matrices, transposed, where); });
}

}  // namespace fastattn::cuda::sim
