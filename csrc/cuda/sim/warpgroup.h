// Products of warpgroups (wgmma), which run beside the threads.
//
// Operands are read when the last of the four warps issues the product, and may not be written until each warp has
// waited.  Until then the accumulator's registers hold a NaN of their own, by which it is seen where a kernel reads or
// writes them too early.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "instructions.h"

namespace fastattn::cuda::sim {

inline constexpr int kWarpsOfGroup = 4;
inline constexpr int kGroupThreads = 128;

// What a thread brings to a product.
struct ProductCall {
  float* d;
  const uint32_t* a;  // registers; null: `a_descriptor`
  uint64_t a_descriptor, b_descriptor;
  bool accumulate;
};

struct ProductShape {
  int n;
  Operands type;
  bool transposed_a, transposed_b;

  int depth() const { return type == Operands::kE4M3 ? 32 : 16; }
};

// The registers of one accumulator in a warpgroup.
struct Accumulator {
  float* d[kGroupThreads];
  int n;
  std::vector<float> values;      // [64][n]
  int under_way[kWarpsOfGroup];   // products that the warp has not waited for
  bool delivered[kWarpsOfGroup];  // the values are in the warp's registers
  std::vector<float> at_fence;    // [thread][n / 2]: what the registers held at each warp's last fence
  bool was_fenced[kWarpsOfGroup];
};

class Warpgroup {
 public:
  explicit Warpgroup(int first_warp) : first_warp_(first_warp) {}

  // All four warps are here.
  void multiply(const ProductShape& shape, void* const (&arguments)[kGroupThreads], Where where);
  // All lanes of a warp of it are here.
  void fence(int warp);
  void commit(int warp);
  void wait(int warp, int pending, Where where);
  void check_exit(int warp, Where where) const;

 private:
  struct Product {
    std::shared_ptr<Accumulator> accumulator;
    uint32_t read;
  };
  struct WarpState {
    bool fenced = false;
    std::vector<Product> open;
    std::vector<std::vector<Product>> committed;
  };

  std::shared_ptr<Accumulator> accumulator(const ProductShape& shape, void* const (&arguments)[kGroupThreads],
                                           Where where);
  void deliver(Accumulator& accumulator, int part, Where where);

  int first_warp_;
  WarpState warps_[kWarpsOfGroup];
  std::vector<std::shared_ptr<Accumulator>> under_way_;
  std::vector<std::shared_ptr<Accumulator>> recent_;  // delivered to all: a few
};

}  // namespace fastattn::cuda::sim
