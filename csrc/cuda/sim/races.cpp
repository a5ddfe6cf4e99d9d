#include "races.h"

#include <algorithm>

namespace fastattn::cuda::sim {

namespace {

constexpr int kLanes = 32;

// Calls f(cell, bytes of the cell) for every four bytes that the access touches.
template <class F>
void for_cells(uint32_t at, int bytes, F f) {
  if (bytes < 4) {
    f(at / 4, static_cast<uint8_t>(((1u << bytes) - 1u) << (at % 4)));
    return;
  }
  for (uint32_t cell = at / 4; cell < (at + static_cast<uint32_t>(bytes)) / 4; ++cell) f(cell, uint8_t{15});
}

}  // namespace

void Races::begin_block(int threads, size_t shared_bytes, std::vector<Time>& times) {
  warps_ = threads / kLanes;
  const size_t cells = (shared_bytes + 3) / 4;
  // Epochs go on counting over blocks, so that only their overflow or another shape needs the old events cleared.
  if (writes_.size() != cells || reads_.size() != cells * static_cast<size_t>(warps_) || last_epoch_ > 0xF0000000u) {
    writes_.assign(cells, Event{});
    reads_.assign(cells * static_cast<size_t>(warps_), Event{});
    last_epoch_ = 0;
  }
  auto clock = std::make_shared<Clock>();
  clock->known.assign(static_cast<size_t>(threads), last_epoch_);
  clock->known_of_warp.assign(static_cast<size_t>(warps_), last_epoch_);
  ++last_epoch_;
  times.assign(static_cast<size_t>(threads), Time{std::move(clock), last_epoch_});
}

void Races::join(const std::vector<std::pair<int, Time>>& arrived, const int* waiting, int count,
                 std::vector<Time>& times) {
  auto joined = std::make_shared<Clock>(*arrived.front().second.clock);
  const Clock* last = arrived.front().second.clock.get();
  for (const auto& [thread, time] : arrived) {
    if (time.clock.get() != last) {  // mostly all come with the same
      last = time.clock.get();
      for (size_t u = 0; u < joined->known.size(); ++u) joined->known[u] = std::max(joined->known[u], last->known[u]);
    }
  }
  for (const auto& [thread, time] : arrived) {
    joined->known[static_cast<size_t>(thread)] = std::max(joined->known[static_cast<size_t>(thread)], time.epoch);
  }
  for (size_t w = 0; w < joined->known_of_warp.size(); ++w) {
    const auto lanes = joined->known.begin() + static_cast<ptrdiff_t>(w) * kLanes;
    joined->known_of_warp[w] = *std::min_element(lanes, lanes + kLanes);
  }
  ++last_epoch_;
  const std::shared_ptr<const Clock> shared = std::move(joined);
  for (int i = 0; i < count; ++i) times[static_cast<size_t>(waiting[i])] = Time{shared, last_epoch_};
}

void Races::note_read(Event& event, uint16_t lane, const Time& time, uint8_t bytes, uint32_t site) {
  const bool together = event.epoch == time.epoch && lane != kSeveral && (event.bytes & bytes) != 0;
  if (!together) {
    event = Event{time.epoch, site, lane, bytes};
  } else if (event.who == lane) {
    event.bytes |= bytes;
  } else if (event.who != kSeveral) {
    event = Event{time.epoch, site, kSeveral, static_cast<uint8_t>(event.bytes & bytes)};
  }
}

Conflict Races::read(int thread, const Time& time, uint32_t at, int bytes, uint32_t site) {
  Conflict conflict;
  const int warp = thread / kLanes;
  for_cells(at, bytes, [&](uint32_t cell, uint8_t mask) {
    const Event& write = writes_[cell];
    if ((write.bytes & mask) != 0 && write.who != thread && write.epoch > time.clock->known[write.who]) {
      conflict = {true, true, write.who, write.who / kLanes, write.site};
      return;
    }
    note_read(reads_[cell * static_cast<size_t>(warps_) + static_cast<size_t>(warp)],
              static_cast<uint16_t>(thread % kLanes), time, mask, site);
  });
  return conflict;
}

Conflict Races::read_by_warp(int warp, const Time& time, uint32_t at, int bytes, uint32_t site) {
  Conflict conflict;
  for_cells(at, bytes, [&](uint32_t cell, uint8_t mask) {
    const Event& write = writes_[cell];
    // No exception for the writer itself: what it reads goes to other lanes.
    if ((write.bytes & mask) != 0 && write.epoch > time.clock->known[write.who]) {
      conflict = {true, true, write.who, write.who / kLanes, write.site};
      return;
    }
    note_read(reads_[cell * static_cast<size_t>(warps_) + static_cast<size_t>(warp)], kSeveral, time, mask, site);
  });
  return conflict;
}

Conflict Races::check_write(int thread, const Time& time, uint32_t at, int bytes) {
  Conflict conflict;
  const Clock& clock = *time.clock;
  for_cells(at, bytes, [&](uint32_t cell, uint8_t mask) {
    const Event& write = writes_[cell];
    if ((write.bytes & mask) != 0 && write.who != thread && write.epoch > clock.known[write.who]) {
      conflict = {true, true, write.who, write.who / kLanes, write.site};
      return;
    }
    const Event* reads = &reads_[cell * static_cast<size_t>(warps_)];
    for (int warp = 0; warp < warps_; ++warp) {
      const Event& read = reads[warp];
      if ((read.bytes & mask) == 0) continue;
      if (read.who == kSeveral) {
        if (read.epoch > clock.known_of_warp[static_cast<size_t>(warp)]) {
          conflict = {true, false, -1, warp, read.site};
        }
      } else if (const int reader = warp * kLanes + read.who;
                 reader != thread && read.epoch > clock.known[static_cast<size_t>(reader)]) {
        conflict = {true, false, reader, warp, read.site};
      }
    }
  });
  return conflict;
}

Conflict Races::write(int thread, const Time& time, uint32_t at, int bytes, uint32_t site) {
  const Conflict conflict = check_write(thread, time, at, bytes);
  if (!conflict.found) {
    for_cells(at, bytes, [&](uint32_t cell, uint8_t mask) {
      writes_[cell] = Event{time.epoch, site, static_cast<uint16_t>(thread), mask};
    });
  }
  return conflict;
}

}  // namespace fastattn::cuda::sim
