// Numbers for source locations: small, the same for equal ones, and readable again.
#pragma once

#include <cstdint>
#include <source_location>
#include <string>
#include <vector>

namespace fastattn::cuda::sim {

class Sites {
 public:
  static uint32_t number(std::source_location where);
  static const std::source_location& location(uint32_t site);

  // Without the directories that all of them share, and "load_tile" of "void load_tile(int) [with T = ...]".
  static std::string file(const std::source_location& where);
  static std::string function(const std::source_location& where);
  // "attention/forward.h:120 in load_tile"
  static std::string text(const std::source_location& where);
};

}  // namespace fastattn::cuda::sim
