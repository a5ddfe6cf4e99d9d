#include "warpgroup.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "block.h"
#include "numbers.h"
#include "simulator.h"
#include "sites.h"

namespace fastattn::cuda::sim {

namespace {

// An operand's rows along K have 32 bytes, which are 16 units of two, whatever numbers they hold.
constexpr int kRows = 64, kDepth = 16, kDeepest = 32, kWidest = 256;

// Of register `i` of a thread of the warpgroup.
int row_of(int thread, int i) { return 16 * (thread / kLanes) + thread % kLanes / 4 + 8 * (i / 2 % 2); }
int column_of(int thread, int i) { return 8 * (i / 4) + 2 * (thread % 4) + i % 2; }

// ---- Operands in shared memory.

// A matrix descriptor, taken apart.
struct Descriptor {
  uint32_t start, leading, stride, base;
  Swizzle swizzle;

  explicit Descriptor(uint64_t bits)
      : start(static_cast<uint32_t>(bits & 0x3FFF) << 4),
        leading(static_cast<uint32_t>(bits >> 16 & 0x3FFF) << 4),
        stride(static_cast<uint32_t>(bits >> 32 & 0x3FFF) << 4),
        base(static_cast<uint32_t>(bits >> 49 & 7)),
        swizzle(static_cast<Swizzle>(bits >> 62)) {}

  uint32_t width() const {  // bytes of a row of the pattern
    return swizzle == Swizzle::k128 ? 128 : swizzle == Swizzle::k64 ? 64 : swizzle == Swizzle::k32 ? 32 : 16;
  }

  // Where the 16 bytes begin that hold, K-major, units k to k + 7 of row `mn`; MN-major, rows mn to mn + 7 of
  // column k.
  uint32_t chunk(bool mn_major, uint32_t mn, uint32_t k) const {
    const uint32_t w = width();
    uint32_t offset;
    if (!mn_major) {
      offset = mn % 8 * w + mn / 8 * stride + k / 8 * (swizzle == Swizzle::kNone ? leading : 16);
    } else if (swizzle == Swizzle::kNone) {
      offset = mn / 8 * stride + k % 8 * 16 + k / 8 * leading;
    } else {
      const uint32_t chunks = w / 16;
      offset = mn / 8 % chunks * 16 + mn / 8 / chunks * leading + k % 8 * w + k / 8 * stride;
    }
    return swizzled(start + offset, swizzle, base);
  }
};

// Who reads: the clocks of a warpgroup's threads, without repetitions.
struct Readers {
  int first_thread;
  uint32_t read;
  const Clock* clocks[kGroupThreads];
  int count = 0;

  Readers(int first, uint32_t number) : first_thread(first), read(number) {
    if (!block.find_races()) return;
    for (int i = 0; i < kGroupThreads; ++i) {
      const Clock* clock = block.time(first + i).clock.get();
      if (std::find(clocks, clocks + count, clock) == clocks + count) clocks[count++] = clock;
    }
  }

  const uint8_t* chunk(uint32_t address, const char* what, Where where) const {
    constexpr int kChunk = 16;
    block.check_bounds(first_thread, address, kChunk, what, where);
    block.check_readable(first_thread, address, kChunk, what, where);
    const uint32_t at = address - kSharedBase;
    if (count != 0) {
      block.check_race(first_thread, block.races().check_written(clocks, count, at, kChunk), address, kChunk, what,
                       where);
    }
    block.async_reads().note(read, at, kChunk);
    return block.shared(address);
  }
};

// to[mn][k], or with `mn_major` to[k][mn].
void load_operand(uint16_t* to, int rows, bool mn_major, uint64_t bits, const Readers& readers, const char* what,
                  Where where) {
  const Descriptor descriptor(bits);
  if (!mn_major) {
    for (int mn = 0; mn < rows; ++mn) {
      for (int k = 0; k < kDepth; k += 8) {
        const uint32_t address = descriptor.chunk(false, static_cast<uint32_t>(mn), static_cast<uint32_t>(k));
        std::memcpy(to + mn * kDepth + k, readers.chunk(address, what, where), 16);
      }
    }
  } else {
    for (int k = 0; k < kDepth; ++k) {
      for (int mn = 0; mn < rows; mn += 8) {
        const uint32_t address = descriptor.chunk(true, static_cast<uint32_t>(mn), static_cast<uint32_t>(k));
        std::memcpy(to + k * rows + mn, readers.chunk(address, what, where), 16);
      }
    }
  }
}

// `count` units.
FASTATTN_CLONES
void widen(float* __restrict to, const uint16_t* __restrict from, int count, Operands type) {
  if (type == Operands::kHalf) {
    for (int i = 0; i < count; ++i) to[i] = half_to_float(from[i]);
  } else if (type == Operands::kBFloat16) {
    for (int i = 0; i < count; ++i) to[i] = bfloat16_to_float(from[i]);
  } else {
    const auto* bytes = reinterpret_cast<const uint8_t*>(from);
    for (int i = 0; i < 2 * count; ++i) to[i] = e4m3_to_float(bytes[i]);
  }
}

void transpose(float* __restrict to, const float* __restrict from, int rows, int columns) {
  for (int i = 0; i < rows; ++i) {
    for (int j = 0; j < columns; ++j) to[j * rows + i] = from[i * columns + j];
  }
}

// d[64][n] += a[64][depth] b[depth][n], k ascending.
FASTATTN_CLONES
void product(float* d, const float* a, const float* b, int n, int depth) {
  using Row = float __attribute__((vector_size(32), aligned(4), may_alias));
  const auto row = [](const float* at) -> const Row& { return *reinterpret_cast<const Row*>(at); };
  for (int column = 0; column < n; column += 16) {
    for (int m = 0; m < kRows; m += 4) {
      Row sum[4][2];
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) sum[i / 2][i % 2] = row(d + (m + i / 2) * n + column + i % 2 * 8);
      for (int k = 0; k < depth; ++k) {
        const Row left = row(b + k * n + column), right = row(b + k * n + column + 8);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          sum[i][0] += a[(m + i) * depth + k] * left;
          sum[i][1] += a[(m + i) * depth + k] * right;
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        *reinterpret_cast<Row*>(d + (m + i / 2) * n + column + i % 2 * 8) = sum[i / 2][i % 2];
      }
    }
  }
}

// The same as sm_90 seems to add 8-bit products: terms and sum are cut off `bits` behind the leading bit of the
// largest.
void product_in_few_bits(float* d, const float* a, const float* b, int n, int depth, int bits) {
  for (int m = 0; m < kRows; ++m) {
    for (int column = 0; column < n; ++column) {
      float terms[kDeepest + 1] = {d[m * n + column]}, largest = std::fabs(terms[0]), sum = 0;
      for (int k = 0; k < depth; ++k) {
        terms[k + 1] = a[m * depth + k] * b[k * n + column];
        largest = std::fmax(largest, std::fabs(terms[k + 1]));
      }
      const float unit = std::ldexp(1.0f, (largest > 0 ? std::ilogb(largest) : 0) - bits);
      for (int k = 0; k <= depth; ++k) sum += std::trunc(terms[k] / unit) * unit;
      d[m * n + column] = sum;
    }
  }
}

}  // namespace

// ---- Accumulators.

std::shared_ptr<Accumulator> Warpgroup::accumulator(const ProductShape& shape, void* const (&arguments)[kGroupThreads],
                                                    Where where) {
  const auto call = [&](int thread) { return static_cast<const ProductCall*>(arguments[thread]); };
  const int registers = shape.n / 2;
  float* const d = call(0)->d;
  for (const auto& other : under_way_) {
    if (other->d[0] == d && other->n == shape.n) return other;
    if (other->d[0] < d + registers && d < other->d[0] + other->n / 2) {
      block.fail(where, "the accumulator of 64 x " + std::to_string(shape.n) +
                            " shares registers with one of another shape that is under way");
    }
  }
  auto fresh = std::make_shared<Accumulator>();
  fresh->n = shape.n;
  fresh->values.assign(static_cast<size_t>(kRows * shape.n), 0.0f);
  const auto known =
      std::find_if(recent_.begin(), recent_.end(), [&](const auto& a) { return a->d[0] == d && a->n == shape.n; });
  for (int thread = 0; thread < kGroupThreads; ++thread) {
    float* mine = fresh->d[thread] = call(thread)->d;
    if (call(0)->accumulate) {
      if (known != recent_.end() && (*known)->was_fenced[thread / kLanes] &&
          std::memcmp(mine, &(*known)->at_fence[static_cast<size_t>(thread * registers)],
                      sizeof(float) * static_cast<size_t>(registers)) != 0) {
        block.fail(first_warp_ * kLanes + thread, where,
                   "missing warpgroup_fence: the accumulator's registers were written after the last one");
      }
      for (int i = 0; i < registers; ++i) {
        fresh->values[static_cast<size_t>(row_of(thread, i) * shape.n + column_of(thread, i))] = mine[i];
      }
    }
    std::fill(mine, mine + registers, from_bits<float>(kInFlightBits));
  }
  if (known != recent_.end()) recent_.erase(known);
  under_way_.push_back(fresh);
  return fresh;
}

void Warpgroup::deliver(Accumulator& accumulator, int part, Where where) {
  const int registers = accumulator.n / 2;
  for (int thread = part * kLanes; thread < (part + 1) * kLanes; ++thread) {
    float* mine = accumulator.d[thread];
    for (int i = 0; i < registers; ++i) {
      if (to_bits(mine[i]) != kInFlightBits) {
        block.fail(first_warp_ * kLanes + thread, where,
                   "register " + std::to_string(i) + " of an accumulator was written before the wait for its product");
      }
      mine[i] = accumulator.values[static_cast<size_t>(row_of(thread, i) * accumulator.n + column_of(thread, i))];
    }
  }
  accumulator.delivered[part] = true;
}

void Warpgroup::multiply(const ProductShape& shape, void* const (&arguments)[kGroupThreads], Where where) {
  const auto call = [&](int thread) { return static_cast<const ProductCall*>(arguments[thread]); };
  const ProductCall& first = *call(0);
  const int first_thread = first_warp_ * kLanes;
  for (int thread = 1; thread < kGroupThreads; ++thread) {
    const ProductCall& other = *call(thread);
    if (other.a_descriptor != first.a_descriptor || other.b_descriptor != first.b_descriptor ||
        other.accumulate != first.accumulate) {
      block.fail(first_thread + thread, where,
                 "the descriptors of a product differ between the threads of a warpgroup");
    }
  }
  const bool continues = std::any_of(under_way_.begin(), under_way_.end(),
                                     [&](const auto& a) { return a->d[0] == first.d && a->n == shape.n; });
  for (const WarpState& warp : warps_) {
    if (!warp.fenced && (!continues || first.a != nullptr)) {
      block.fail(where, "missing warpgroup_fence: registers of this product may have been used since the last wait");
    }
  }

  const uint32_t read = block.async_reads().open(first_warp_, -1, Sites::number(where));
  const Readers readers(first_thread, read);
  alignas(32) float a[kRows * kDeepest], b[kDeepest * kWidest], turned[kDeepest * kWidest];
  uint16_t raw[kDepth * kWidest];
  if (first.a != nullptr) {
    for (int thread = 0; thread < kGroupThreads; ++thread) {
      const int row = row_of(thread, 0), column = column_of(thread, 0);
      for (int i = 0; i < 4; ++i) {
        std::memcpy(&raw[(row + i % 2 * 8) * kDepth + column + i / 2 * 8], &call(thread)->a[i], 4);
      }
    }
    widen(a, raw, kRows * kDepth, shape.type);
  } else {
    load_operand(raw, kRows, shape.transposed_a, first.a_descriptor, readers, "operand A", where);
    widen(shape.transposed_a ? turned : a, raw, kRows * kDepth, shape.type);
    if (shape.transposed_a) transpose(a, turned, kDepth, kRows);
  }
  load_operand(raw, shape.n, shape.transposed_b, first.b_descriptor, readers, "operand B", where);
  widen(shape.transposed_b ? b : turned, raw, shape.n * kDepth, shape.type);
  if (!shape.transposed_b) transpose(b, turned, shape.n, shape.depth());

  const std::shared_ptr<Accumulator> sums = accumulator(shape, arguments, where);
  if (!first.accumulate) std::fill(sums->values.begin(), sums->values.end(), 0.0f);
  if (const int bits = options().sum_bits; bits != 0 && shape.type == Operands::kE4M3) {
    product_in_few_bits(sums->values.data(), a, b, shape.n, shape.depth(), bits);
  } else {
    product(sums->values.data(), a, b, shape.n, shape.depth());
  }
  for (int part = 0; part < kWarpsOfGroup; ++part) {
    warps_[part].open.push_back({sums, read});
    ++sums->under_way[part];
    sums->delivered[part] = false;
  }
  ++block.report().warpgroup_products;
}

void Warpgroup::fence(int warp) {
  const int part = warp - first_warp_;
  warps_[part].fenced = true;
  for (const auto& accumulator : recent_) {
    const auto registers = static_cast<size_t>(accumulator->n / 2);
    accumulator->at_fence.resize(kGroupThreads * registers);
    for (int thread = part * kLanes; thread < (part + 1) * kLanes; ++thread) {
      std::memcpy(&accumulator->at_fence[static_cast<size_t>(thread) * registers], accumulator->d[thread],
                  sizeof(float) * registers);
    }
    accumulator->was_fenced[part] = true;
  }
}

void Warpgroup::commit(int warp) {
  WarpState& state = warps_[warp - first_warp_];
  state.committed.push_back(std::move(state.open));
  state.open.clear();
}

void Warpgroup::wait(int warp, int pending, Where where) {
  constexpr size_t kRecent = 4;
  const int part = warp - first_warp_;
  WarpState& state = warps_[part];
  if (state.committed.size() <= static_cast<size_t>(pending)) return;
  const uint32_t epoch = block.find_races() ? block.advance_warp() : 0;
  const auto end = state.committed.end() - pending;
  for (auto group = state.committed.begin(); group != end; ++group) {
    for (const Product& product : *group) {
      block.async_reads().end(product.read, part, epoch);
      Accumulator& accumulator = *product.accumulator;
      if (--accumulator.under_way[part] != 0) continue;
      deliver(accumulator, part, where);
      if (!std::all_of(accumulator.delivered, accumulator.delivered + kWarpsOfGroup, [](bool is) { return is; })) {
        continue;
      }
      std::erase(under_way_, product.accumulator);
      if (recent_.size() == kRecent) recent_.erase(recent_.begin());
      recent_.push_back(product.accumulator);
    }
  }
  state.committed.erase(state.committed.begin(), end);
  state.fenced = false;
}

void Warpgroup::check_exit(int warp, Where where) const {
  const WarpState& state = warps_[warp - first_warp_];
  if (!state.open.empty() || !state.committed.empty()) {
    block.fail(where, "the warp exits, and products that it issued are still under way");
  }
}

// ---- The instructions.

void warpgroup_multiply(float* d, int n, const uint32_t* a, uint64_t a_descriptor, uint64_t b_descriptor,
                        bool accumulate, Operands type, bool transposed_a, bool transposed_b, Where where) {
  ProductCall mine{d, a, a_descriptor, b_descriptor, accumulate};
  const int parameter = n * 32 + static_cast<int>(type) * 8 + (a != nullptr) * 4 + transposed_a * 2 + transposed_b;
  block.meet_warpgroup(Operation::kWarpgroupMultiply, parameter, where, mine, [&](void* const(&all)[kGroupThreads]) {
    block.warpgroup().multiply({n, type, transposed_a, transposed_b}, all, where);
  });
}

void warpgroup_fence(Where where) {
  int nothing = 0;
  block.meet(Operation::kWarpgroupFence, 0, where, nothing,
             [](void**) { block.warpgroup().fence(current_position.thread / kLanes); });
}

void warpgroup_commit(Where where) {
  int nothing = 0;
  block.meet(Operation::kWarpgroupCommit, 0, where, nothing,
             [](void**) { block.warpgroup().commit(current_position.thread / kLanes); });
}

void warpgroup_wait(int pending, Where where) {
  int nothing = 0;
  block.meet(Operation::kWarpgroupWait, pending, where, nothing,
             [=](void**) { block.warpgroup().wait(current_position.thread / kLanes, pending, where); });
}

void registers_increase(int registers, Where where) { block.set_registers(registers, /*increase=*/true, where); }
void registers_decrease(int registers, Where where) { block.set_registers(registers, /*increase=*/false, where); }

}  // namespace fastattn::cuda::sim
