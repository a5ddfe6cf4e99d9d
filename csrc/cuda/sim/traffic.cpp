#include "traffic.h"

#include "sites.h"

#include <algorithm>

namespace fastattn::cuda::sim {

namespace {

bool is_global(Access access) {
  switch (access) {
    case Access::kGlobalLoad:
    case Access::kConstantLoad:
    case Access::kGlobalStore:
    case Access::kAtomic:
    case Access::kCopyFromGlobal:
      return true;
    default:
      return false;
  }
}

Traffic shared_traffic(uint32_t lanes, const uint64_t* address, int bytes) {
  // Accesses of 8 bytes are served in halves of the warp, of 16 in quarters.
  const int passes = std::max(1, bytes / 4), lanes_of_pass = 32 / passes, words_of_lane = std::max(1, bytes / 4);
  Traffic traffic{1, 0, 0};
  for (int pass = 0; pass < passes; ++pass) {
    uint32_t words[32];
    int count = 0;
    for (int lane = pass * lanes_of_pass; lane < (pass + 1) * lanes_of_pass; ++lane) {
      if ((lanes >> lane & 1) == 0) continue;
      for (int word = 0; word < words_of_lane; ++word) {
        words[count++] = static_cast<uint32_t>(address[lane] / 4) + static_cast<uint32_t>(word);
      }
    }
    if (count == 0) continue;
    ++traffic.ideal;
    traffic.actual += wavefronts(words, count);
  }
  return traffic;
}

Traffic global_traffic(uint32_t lanes, const uint64_t* address, int bytes) {
  uint64_t addresses[32], sectors[32];
  int count = 0;
  for (int lane = 0; lane < 32; ++lane) {
    if ((lanes >> lane & 1) != 0) addresses[count++] = address[lane];
  }
  std::sort(addresses, addresses + count);
  const auto distinct = std::unique(addresses, addresses + count) - addresses;
  std::transform(addresses, addresses + distinct, sectors, [](uint64_t a) { return a / 32; });
  const auto touched = std::unique(sectors, sectors + distinct) - sectors;
  return {1, (distinct * bytes + 31) / 32, touched};
}

}  // namespace

const char* access_name(Access access) {
  switch (access) {
    case Access::kSharedLoad:
      return "load_shared";
    case Access::kSharedStore:
      return "store_shared";
    case Access::kMatrixLoad:
      return "load_matrix";
    case Access::kMatrixStore:
      return "store_matrix";
    case Access::kCopyToShared:
      return "copy_async_to_shared";
    case Access::kGlobalLoad:
      return "load_global";
    case Access::kConstantLoad:
      return "load_constant";
    case Access::kGlobalStore:
      return "store_global";
    case Access::kAtomic:
      return "atomic_add";
    case Access::kCopyFromGlobal:
      return "copy_async_from_global";
    case Access::kCount:
      break;
  }
  return "?";
}

int wavefronts(const uint32_t* words, int count) {
  uint32_t first[32];   // the first word asked of each bank
  uint32_t others[32];  // further different words
  int other_count = 0, load[32] = {}, most = 1;
  for (int i = 0; i < count; ++i) {
    const uint32_t word = words[i], bank = word % 32;
    if (load[bank] == 0) {
      load[bank] = 1;
      first[bank] = word;
    } else if (first[bank] != word && std::find(others, others + other_count, word) == others + other_count) {
      others[other_count++] = word;
      most = std::max(most, ++load[bank]);
    }
  }
  return most;
}

void Traffics::add(uint32_t site, Access access, const Traffic& traffic) {
  if (site >= lines_.size()) lines_.resize(site + 1);
  for (Line& line : lines_[site]) {
    if (line.access == access) {
      line.traffic += traffic;
      return;
    }
  }
  lines_[site].push_back({access, traffic});
}

void Traffics::report(Report& report) {
  for (size_t site = 0; site < lines_.size(); ++site) {
    for (const Line& line : lines_[site]) {
      const auto& where = Sites::location(static_cast<uint32_t>(site));
      report.traffic[static_cast<int>(line.access)] += line.traffic;
      report.lines.push_back(
          {Sites::file(where), static_cast<int>(where.line()), Sites::function(where), line.access, line.traffic});
    }
  }
  lines_.clear();
}

void Requests::access(int lane, uint32_t site, Access access, uint64_t address, int bytes) {
  constexpr uint32_t kLookAhead = 256;
  const auto end = static_cast<uint32_t>(std::min<size_t>(pending_.size(), next_[lane] + kLookAhead));
  for (uint32_t i = next_[lane]; i < end; ++i) {
    Request& request = pending_[i];
    if (request.site == site && request.access == access && (request.lanes >> lane & 1) == 0) {
      request.lanes |= 1u << lane;
      request.address[lane] = address;
      next_[lane] = i + 1;
      return;
    }
  }
  Request& request = pending_.emplace_back();
  request.site = site;
  request.access = access;
  request.bytes = static_cast<uint8_t>(bytes);
  request.lanes = 1u << lane;
  request.address[lane] = address;
  // An out-of-order lane goes on where it was; one that leads has nothing before it to find.
  if (next_[lane] + 1 == pending_.size()) next_[lane] = static_cast<uint32_t>(pending_.size());
}

void Requests::flush(Traffics& traffics) {
  for (const Request& request : pending_) {
    traffics.add(request.site, request.access,
                 is_global(request.access) ? global_traffic(request.lanes, request.address, request.bytes)
                                           : shared_traffic(request.lanes, request.address, request.bytes));
  }
  pending_.clear();
  std::fill(std::begin(next_), std::end(next_), 0);
}

}  // namespace fastattn::cuda::sim
