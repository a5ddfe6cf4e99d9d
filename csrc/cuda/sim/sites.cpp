#include "sites.h"

#include <bit>
#include <cstring>
#include <filesystem>
#include <map>
#include <string_view>
#include <tuple>

namespace fastattn::cuda::sim {

namespace {

static_assert(sizeof(std::source_location) == sizeof(uintptr_t));

// A location is a pointer to a constant of its translation unit; two units may hold equal ones.
struct Table {
  static constexpr size_t kSlots = 4096;
  struct Slot {
    uintptr_t key = 0;
    uint32_t site = 0;
  };
  Slot slots[kSlots];
  std::vector<std::source_location> locations;
  std::map<std::tuple<std::string, uint32_t, uint32_t, std::string>, uint32_t> known;
};
Table table;

}  // namespace

uint32_t Sites::number(std::source_location where) {
  const auto key = std::bit_cast<uintptr_t>(where);
  Table::Slot& slot = table.slots[(key >> 3) % Table::kSlots];
  if (slot.key == key) return slot.site;
  const auto [found, fresh] =
      table.known.try_emplace({where.file_name(), where.line(), where.column(), where.function_name()},
                              static_cast<uint32_t>(table.locations.size()));
  if (fresh) table.locations.push_back(where);
  slot = {key, found->second};
  return slot.site;
}

const std::source_location& Sites::location(uint32_t site) { return table.locations.at(site); }

std::string Sites::file(const std::source_location& where) {
  const std::string path = std::filesystem::path(where.file_name()).lexically_normal().string();
  const size_t root = path.rfind("csrc/cuda/");
  return path.substr(root != std::string::npos ? root + std::strlen("csrc/cuda/") : path.rfind('/') + 1);
}

std::string Sites::function(const std::source_location& where) {
  std::string_view name = where.function_name();
  const bool lambda = name.find("<lambda") != std::string_view::npos;
  name = name.substr(0, name.find('('));
  name = name.substr(0, name.find('<'));
  name = name.substr(name.find_last_of(" :*&") + 1);
  return std::string(name) + (lambda ? " (a lambda)" : "");
}

std::string Sites::text(const std::source_location& where) {
  return file(where) + ":" + std::to_string(where.line()) + " in " + function(where);
}

}  // namespace fastattn::cuda::sim
