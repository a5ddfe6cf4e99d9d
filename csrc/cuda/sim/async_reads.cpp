#include "async_reads.h"

#include <algorithm>

namespace fastattn::cuda::sim {

namespace {
constexpr int kLanes = 32;
}

void AsyncReads::begin_block(int threads, size_t shared_bytes) {
  const auto columns = static_cast<size_t>((threads + 127) / 128 + 1);
  const size_t units = (shared_bytes + kUnit - 1) / kUnit;
  before_ += static_cast<uint32_t>(reads_.size());
  reads_.clear();
  if (columns != columns_ || latest_.size() != units * columns || before_ > 0xF0000000u) {
    columns_ = columns;
    latest_.assign(units * columns, 0);
    before_ = 0;
  }
}

uint32_t AsyncReads::open(int first_warp, int thread, uint32_t site) {
  reads_.push_back({first_warp, thread, site, {}, {}});
  return before_ + static_cast<uint32_t>(reads_.size());
}

void AsyncReads::note(uint32_t read, uint32_t at, int bytes) {
  const Read& what = reads_[read - before_ - 1];
  const size_t column = what.thread >= 0 ? columns_ - 1 : static_cast<size_t>(what.first_warp / kParts);
  for (size_t unit = at / kUnit, end = (at + static_cast<uint32_t>(bytes)) / kUnit; unit < end; ++unit) {
    latest_[unit * columns_ + column] = read;
  }
}

void AsyncReads::end(uint32_t read, int part, uint32_t epoch) {
  Read& what = reads_[read - before_ - 1];
  what.over[part] = true;
  what.epoch[part] = epoch;
}

bool AsyncReads::is_under_way(const Read& read) const {
  return read.thread >= 0 ? !read.over[0] : !std::all_of(read.over, read.over + kParts, [](bool over) { return over; });
}

const AsyncReads::Read* AsyncReads::find(int writer, const Clock* clock, uint32_t at, int bytes) const {
  if (reads_.empty()) return nullptr;
  const size_t end = (at + static_cast<uint32_t>(bytes) + kUnit - 1) / kUnit;
  for (size_t unit = at / kUnit; unit < end; ++unit) {
    for (size_t column = 0; column < columns_; ++column) {
      const uint32_t number = latest_[unit * columns_ + column];
      if (number <= before_) continue;
      const Read& read = reads_[number - before_ - 1];
      if (is_under_way(read)) return &read;
      if (clock == nullptr) continue;
      if (read.thread >= 0) {
        if (read.thread != writer && clock->known[static_cast<size_t>(read.thread)] < read.epoch[0]) return &read;
        continue;
      }
      for (int part = 0; part < kParts; ++part) {
        const int warp = read.first_warp + part;
        if (warp != writer / kLanes && clock->latest_of_warp[static_cast<size_t>(warp)] < read.epoch[part]) {
          return &read;
        }
      }
    }
  }
  return nullptr;
}

}  // namespace fastattn::cuda::sim
