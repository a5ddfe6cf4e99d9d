#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "arena.h"

namespace fastattn::cpu {

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512bf16 {
extern const Kernels kernels;
}
namespace amx {
extern const Kernels kernels;
}
#endif

namespace {

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// Tile registers are off until a process asks the kernel for them; the answer holds for all its threads.
bool has_amx() {
#if defined(FASTATTN_EMULATE_AMX)
  return has_avx512bf16();
#elif defined(__linux__)
  unsigned eax = 7, ebx, ecx = 0, edx;
  __asm__("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  const bool bf16 = edx >> 22 & 1, tile = edx >> 24 & 1;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return bf16 && tile && has_avx512bf16() && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// Where vdpbf16ps is worth it by itself.  Zen runs it at the rate of an fp32 FMA (twice the work); Intel's cores run
// it at a quarter of that rate, so there fp32 arithmetic on converted operands is the faster path without AMX.
bool prefers_avx512bf16() { return has_avx512bf16() && __builtin_cpu_is("amd"); }
#endif

struct Candidate {
  const Kernels* kernels;
  bool (*supported)();
  bool (*preferred)();
};

// Best first.
const Candidate kCandidates[] = {
#if defined(__x86_64__)
    {&amx::kernels, has_amx, has_amx},          {&avx512bf16::kernels, has_avx512bf16, prefers_avx512bf16},
    {&avx512::kernels, has_avx512, has_avx512}, {&avx2::kernels, has_avx2, has_avx2},
#endif
    {&baseline::kernels, always, always},
};

const Kernels& choose() {
  const char* forced = std::getenv("FASTATTN_CPU_ISA");
  if (forced && *forced) {
    for (const Candidate& candidate : kCandidates)
      if (std::strcmp(candidate.kernels->isa, forced) == 0) {
        if (!candidate.supported())
          throw std::runtime_error(std::string("FASTATTN_CPU_ISA=") + forced + ": this machine does not have it");
        return *candidate.kernels;
      }
    throw std::runtime_error(std::string("FASTATTN_CPU_ISA=") + forced + ": not compiled into this library");
  }
  for (const Candidate& candidate : kCandidates)
    if (candidate.preferred()) return *candidate.kernels;
  return baseline::kernels;
}

constexpr size_t kKeptBytes = size_t{8} << 20;

struct ThreadBuffer {
  char* data = nullptr;
  size_t size = 0;
  ~ThreadBuffer() { std::free(data); }
};

thread_local ThreadBuffer buffer;

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

std::string describe() {
  std::string isa, error, compiled, supported;
  try {
    isa = kernels().isa;
  } catch (const std::exception& problem) {
    error = problem.what();
  }
  for (const Candidate& candidate : kCandidates) {
    const std::string name = std::string("\"") + candidate.kernels->isa + "\"";
    compiled += (compiled.empty() ? "" : ", ") + name;
    if (candidate.supported()) supported += (supported.empty() ? "" : ", ") + name;
  }
  std::string text = "{\"isa\": \"" + isa + "\", \"compiled\": [" + compiled + "], \"supported\": [" + supported + "]";
#if !defined(__x86_64__)
  text += ", \"proof\": \"compile-checked only: no run of the tests on this architecture is recorded\"";
#endif
  if (!error.empty()) text += ", \"error\": \"" + error + "\"";
  return text + "}";
}

char* thread_scratch(size_t bytes) {
  if (bytes > buffer.size || (buffer.size > kKeptBytes && bytes <= kKeptBytes)) {
    std::free(buffer.data);
    buffer.size = (bytes + 4095) / 4096 * 4096;
    buffer.data = static_cast<char*>(std::aligned_alloc(4096, buffer.size));
    if (!buffer.data) {
      buffer.size = 0;
      throw std::bad_alloc();
    }
  }
  return buffer.data;
}

}  // namespace fastattn::cpu
