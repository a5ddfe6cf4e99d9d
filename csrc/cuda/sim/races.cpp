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
  threads_ = threads;
  acquired_.clear(), fences_.clear();
  const size_t cells = (shared_bytes + 3) / 4;
  // Epochs go on counting over blocks, so that only their overflow or another shape needs the old events cleared.
  if (writes_.size() != cells || reads_.size() != cells * static_cast<size_t>(warps_) || last_epoch_ > 0xF0000000u) {
    writes_.assign(cells, Event{});
    reads_.assign(cells * static_cast<size_t>(warps_), Event{});
    last_epoch_ = 0;
  }
  was_read_.assign(cells / kCellsOfLine + 1, false);
  auto clock = std::make_shared<Clock>();
  clock->known.assign(static_cast<size_t>(threads + kAgents), last_epoch_);
  clock->fenced = clock->known;
  clock->known_of_warp.assign(static_cast<size_t>(warps_), last_epoch_);
  clock->latest_of_warp = clock->known_of_warp;
  times.assign(static_cast<size_t>(threads), Time{std::move(clock), last_epoch_ + 1, last_epoch_});
  ++last_epoch_;
}

namespace {

void raise(std::vector<uint32_t>& to, const std::vector<uint32_t>& from) {
  for (size_t u = 0; u < to.size(); ++u) to[u] = std::max(to[u], from[u]);
}

void sum_up_warps(Clock& clock) {
  for (size_t w = 0; w < clock.known_of_warp.size(); ++w) {
    const auto lanes = clock.known.begin() + static_cast<ptrdiff_t>(w) * kLanes;
    clock.known_of_warp[w] = *std::min_element(lanes, lanes + kLanes);
    clock.latest_of_warp[w] = *std::max_element(lanes, lanes + kLanes);
  }
}

}  // namespace

std::shared_ptr<const Clock> Races::knowledge_of(const Arrivals& arrived, int agent, uint32_t agent_epoch) const {
  auto joined = std::make_shared<Clock>(*arrived.front().second.clock);
  const Clock* last = arrived.front().second.clock.get();
  for (const auto& [thread, time] : arrived) {
    if (time.clock.get() != last) {  // mostly all come with the same
      last = time.clock.get();
      raise(joined->known, last->known);
      raise(joined->fenced, last->fenced);
    }
  }
  for (const auto& [thread, time] : arrived) {
    const auto t = static_cast<size_t>(thread);
    joined->known[t] = std::max(joined->known[t], time.epoch);
    joined->fenced[t] = std::max(joined->fenced[t], time.fenced);
  }
  uint32_t& written = joined->known[static_cast<size_t>(threads_ + agent)];
  written = std::max(written, agent_epoch);
  sum_up_warps(*joined);
  return joined;
}

void Races::join(const Arrivals& arrived, const int* waiting, int count, std::vector<Time>& times) {
  const std::shared_ptr<const Clock> shared = knowledge_of(arrived);
  ++last_epoch_;
  for (int i = 0; i < count; ++i) {
    Time& time = times[static_cast<size_t>(waiting[i])];
    time = Time{shared, last_epoch_, time.fenced};
  }
}

std::shared_ptr<const Clock> Races::find(const std::vector<Result>& results, const Clock* from,
                                         const Clock* with) const {
  for (const Result& result : results) {
    if (result.from.get() == from && result.with.get() == with) return result.clock;
  }
  return nullptr;
}

void Races::keep(std::vector<Result>& results, Result result) {
  constexpr size_t kKept = 16;
  if (results.size() == kKept) results.erase(results.begin());
  results.push_back(std::move(result));
}

void Races::acquire(Time& time, const std::shared_ptr<const Clock>& announced) {
  if (announced == nullptr || announced == time.clock) return;
  std::shared_ptr<const Clock> clock = find(acquired_, time.clock.get(), announced.get());
  if (clock == nullptr) {
    auto merged = std::make_shared<Clock>(*time.clock);
    raise(merged->known, announced->known);
    raise(merged->fenced, announced->fenced);
    sum_up_warps(*merged);
    clock = std::move(merged);
    keep(acquired_, {time.clock, announced, clock});
  }
  time.clock = std::move(clock);
}

void Races::fence(Time& time) {
  std::shared_ptr<const Clock> clock = find(fences_, time.clock.get(), nullptr);
  if (clock == nullptr) {
    auto fenced = std::make_shared<Clock>(*time.clock);
    fenced->fenced = fenced->known;
    clock = std::move(fenced);
    keep(fences_, {time.clock, nullptr, clock});
  }
  time.clock = std::move(clock);
  time.fenced = time.epoch;
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
      conflict = {true, true, false, write.who, write.who / kLanes, write.site};
      return;
    }
    note_read(reads_[cell * static_cast<size_t>(warps_) + static_cast<size_t>(warp)],
              static_cast<uint16_t>(thread % kLanes), time, mask, site);
    was_read_[cell / kCellsOfLine] = true;
  });
  return conflict;
}

Conflict Races::read_by_warp(int warp, const Time& time, uint32_t at, int bytes, uint32_t site) {
  Conflict conflict;
  for_cells(at, bytes, [&](uint32_t cell, uint8_t mask) {
    const Event& write = writes_[cell];
    // No exception for the writer itself: what it reads goes to other lanes.
    if ((write.bytes & mask) != 0 && write.epoch > time.clock->known[write.who]) {
      conflict = {true, true, false, write.who, write.who / kLanes, write.site};
      return;
    }
    note_read(reads_[cell * static_cast<size_t>(warps_) + static_cast<size_t>(warp)], kSeveral, time, mask, site);
    was_read_[cell / kCellsOfLine] = true;
  });
  return conflict;
}

Conflict Races::check_write(int thread, const Time& time, uint32_t at, int bytes) {
  Conflict conflict;
  const Clock& clock = *time.clock;
  for_cells(at, bytes, [&](uint32_t cell, uint8_t mask) {
    const Event& write = writes_[cell];
    if ((write.bytes & mask) != 0 && write.who != thread && write.epoch > clock.known[write.who]) {
      conflict = {true, true, false, write.who, write.who / kLanes, write.site};
      return;
    }
    if (!was_read_[cell / kCellsOfLine]) return;
    const Event* reads = &reads_[cell * static_cast<size_t>(warps_)];
    for (int warp = 0; warp < warps_; ++warp) {
      const Event& read = reads[warp];
      if ((read.bytes & mask) == 0) continue;
      if (read.who == kSeveral) {
        if (read.epoch > clock.known_of_warp[static_cast<size_t>(warp)]) {
          conflict = {true, false, false, -1, warp, read.site};
        }
      } else if (const int reader = warp * kLanes + read.who;
                 reader != thread && read.epoch > clock.known[static_cast<size_t>(reader)]) {
        conflict = {true, false, false, reader, warp, read.site};
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

Conflict Races::check_written(int thread, const Time& time, uint32_t at, int bytes) const {
  Conflict conflict;
  for_cells(at, bytes, [&](uint32_t cell, uint8_t mask) {
    const Event& write = writes_[cell];
    if ((write.bytes & mask) == 0 || conflict.found) return;
    const bool own = write.who == thread;
    const bool unordered = !own && write.epoch > time.clock->known[write.who];
    const bool unfenced =
        write.who < threads_ && write.epoch > std::max(time.clock->fenced[write.who], own ? time.fenced : 0u);
    if (unordered || unfenced) conflict = {true, true, !unordered, write.who, write.who / kLanes, write.site};
  });
  return conflict;
}

Conflict Races::check_written(const Clock* const* clocks, int count, uint32_t at, int bytes) const {
  Conflict conflict;
  for_cells(at, bytes, [&](uint32_t cell, uint8_t mask) {
    const Event& write = writes_[cell];
    if ((write.bytes & mask) == 0 || conflict.found) return;
    for (int i = 0; i < count; ++i) {
      const bool unordered = write.epoch > clocks[i]->known[write.who];
      const bool unfenced = write.who < threads_ && write.epoch > clocks[i]->fenced[write.who];
      if (unordered || unfenced) conflict = {true, true, !unordered, write.who, write.who / kLanes, write.site};
    }
  });
  return conflict;
}

void Races::write_by_agent(int agent, uint32_t epoch, uint32_t at, int bytes, uint32_t site) {
  for_cells(at, bytes, [&](uint32_t cell, uint8_t mask) {
    writes_[cell] = Event{epoch, site, static_cast<uint16_t>(threads_ + agent), mask};
  });
}

}  // namespace fastattn::cuda::sim
