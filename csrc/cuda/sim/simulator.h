// What a program that launches kernels in the simulator says and asks: memory, options, reports.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace fastattn::cuda::sim {

// The global memory that kernels may touch.  Anything else is an error.
class Memory {
 public:
  // Ranges may overlap: an access is allowed where one range that allows it holds all of it.  `name` is for messages.
  static void register_range(const void* begin, size_t bytes, bool writable, std::string name = {});
  // Forgets the newest range that begins there.
  static void unregister_range(const void* begin);
  static void clear();
};

struct Options {
  bool races = true;          // find unordered accesses to shared memory
  bool counters = true;       // count wavefronts and sectors
  int shared_limit = 166912;  // bytes of dynamic shared memory that a block may have: 163 KB, sm_80
  int sum_bits = 0;           // not 0: sums of 8-bit products keep so many bits behind the leading one, as chips do
  uint64_t seed = 0;          // not 0: warps run, and tensor copies arrive, in an order of chance
};
// To begin with, races are as FASTATTN_SIMULATOR_RACES says (0 or 1).
Options& options();

// Requests of whole warps.  For shared memory, units are wavefronts: one serves all 32 banks once, and `ideal` is what
// the request's width alone needs (a 16-byte access of 32 lanes: four).  For global memory, units are 32-byte sectors,
// and `ideal` is the distinct bytes over 32.
struct Traffic {
  int64_t requests = 0;
  int64_t ideal = 0;
  int64_t actual = 0;
  Traffic& operator+=(const Traffic& other) {
    requests += other.requests, ideal += other.ideal, actual += other.actual;
    return *this;
  }
};

enum class Access : uint8_t {
  kSharedLoad,
  kSharedStore,
  kMatrixLoad,
  kMatrixStore,
  kCopyToShared,
  kGlobalLoad,
  kConstantLoad,
  kGlobalStore,
  kAtomic,
  kCopyFromGlobal,
  kCount,
};
const char* access_name(Access access);

// One source line's part.
struct LineTraffic {
  std::string file;
  int line;
  std::string function;
  Access access;
  Traffic traffic;
};

struct Report {
  std::string kernel;
  int grid[3] = {};
  int threads = 0;
  int shared_bytes = 0;
  Traffic traffic[static_cast<int>(Access::kCount)];
  int64_t products = 0;  // mma instructions of warps
  int64_t warpgroup_products = 0;
  int64_t tensor_copies = 0;   // loads, stores and reductions beside the threads
  int64_t shuffles = 0;        // shuffles and votes of warps
  int64_t warp_barriers = 0;   // sync_warp
  int64_t block_barriers = 0;  // arrivals of warps at barriers
  std::vector<LineTraffic> lines;
};

// One for each launch since the last clear, also for one that failed; of the latest 256.
const std::vector<Report>& reports();
void clear_reports();

}  // namespace fastattn::cuda::sim
