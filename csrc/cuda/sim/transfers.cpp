#include "transfers.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "block.h"
#include "sites.h"

namespace fastattn::cuda::sim {

namespace {

constexpr uint32_t kChunk = 16;

Swizzle swizzle_of(const Piece& piece) {
  return piece.map != nullptr ? static_cast<Swizzle>(piece.map->swizzle) : Swizzle::kNone;
}

// Calls f(offset of the row in the box, bytes of the row, BoxRow) for all rows of the piece.
template <class F>
void for_rows(const Piece& piece, F f) {
  if (piece.map == nullptr) {
    f(0, piece.bytes, BoxRow{piece.data, 0, piece.bytes});
    return;
  }
  const int row_bytes = piece.map->row_bytes();
  for_box_rows(*piece.map, piece.at, [&](int row, const BoxRow& data) { f(row * row_bytes, row_bytes, data); });
}

// Where the data of a piece lies: its shared memory, an alignment that the instruction asks for, its global memory.
void check_piece(const Piece& piece, uint32_t shared, bool write, bool add, const char* what, Where where) {
  const int thread = current_position.thread;
  const uint32_t alignment = piece.map != nullptr ? 128 : kChunk;
  if (shared % alignment != 0) {
    block.fail(where, std::string(what) + " of " + shared_text(shared, piece.bytes) + ": not a multiple of " +
                          std::to_string(alignment));
  }
  block.check_bounds(thread, shared, piece.bytes, what, where);
  for_rows(piece, [&](int, int, const BoxRow& row) {
    if (row.last > row.first) check_global_bytes(row.data, row.last - row.first, write, add, what, where);
  });
}

}  // namespace

void Transfers::load(const Piece& piece, uint32_t to, uint32_t barrier, Where where) {
  const char* what = piece.map != nullptr ? "tensor_load" : "bulk_load";
  const int thread = current_position.thread;
  check_piece(piece, to, false, false, what, where);
  block.mbarriers().check_copy(barrier, where);
  block.check_write(thread, to, piece.bytes, what, where);
  if (block.find_races()) {
    const uint32_t at = to - kSharedBase;
    block.check_race(thread, block.races().check_write(thread, block.time(thread), at, piece.bytes), to, piece.bytes,
                     what, where);
    block.check_race(thread, block.races().check_written(thread, block.time(thread), at, piece.bytes), to, piece.bytes,
                     what, where);
  }
  std::memset(block.shared(to), 0xFF, static_cast<size_t>(piece.bytes));
  block.mark(to, piece.bytes, kInFlight);
  loads_.push_back({piece, to, barrier, Sites::number(where), thread});
  ++block.report().tensor_copies;
}

bool Transfers::arrive() {
  if (loads_.empty()) return false;
  const size_t which = block.random(loads_.size());
  const Load load = loads_[which];
  loads_.erase(loads_.begin() + static_cast<ptrdiff_t>(which));

  const Swizzle swizzle = swizzle_of(load.piece);
  for_rows(load.piece, [&](int offset, int bytes, const BoxRow& row) {
    const uint32_t begin = load.to + static_cast<uint32_t>(offset);
    for (int chunk = 0; chunk < bytes; chunk += static_cast<int>(kChunk)) {
      uint8_t* to = block.shared(swizzled(begin + static_cast<uint32_t>(chunk), swizzle));
      const int first = std::max(row.first, chunk), last = std::min(row.last, chunk + static_cast<int>(kChunk));
      if (last - first != static_cast<int>(kChunk)) std::memset(to, 0, kChunk);
      if (last > first)
        std::memcpy(to + (first - chunk), row.data + (first - row.first), static_cast<size_t>(last - first));
    }
  });
  block.mark(load.to, load.piece.bytes, kWritten);
  block.mbarriers().complete(load.barrier, load.to, load.piece.bytes, load.thread, load.site);
  return true;
}

bool Transfers::find_load(uint32_t address, int bytes, int& thread, uint32_t& site) const {
  for (const Load& load : loads_) {
    if (load.to < address + static_cast<uint32_t>(bytes) &&
        address < load.to + static_cast<uint32_t>(load.piece.bytes)) {
      thread = load.thread, site = load.site;
      return true;
    }
  }
  return false;
}

void Transfers::store(const Piece& piece, uint32_t from, bool add, Where where) {
  const char* what = add ? "bulk_reduce_add" : "tensor_store";
  const int thread = current_position.thread;
  check_piece(piece, from, true, add, what, where);
  block.check_readable(thread, from, piece.bytes, what, where);
  const uint32_t site = Sites::number(where);
  if (block.find_races()) {
    block.check_race(thread, block.races().check_written(thread, block.time(thread), from - kSharedBase, piece.bytes),
                     from, piece.bytes, what, where);
  }
  Outgoing store{piece, add, site, block.async_reads().open(0, thread, site), false, {}};
  block.async_reads().note(store.read, from - kSharedBase, piece.bytes);
  store.rows.resize(static_cast<size_t>(piece.bytes));
  const Swizzle swizzle = swizzle_of(piece);
  for (uint32_t chunk = 0; chunk < static_cast<uint32_t>(piece.bytes); chunk += kChunk) {
    std::memcpy(&store.rows[chunk], block.shared(swizzled(from + chunk, swizzle)), kChunk);
  }
  block.self().outgoing.open.push_back(std::move(store));
  ++block.report().tensor_copies;
}

void Transfers::finish(const Outgoing& store) {
  for_rows(store.piece, [&](int offset, int, const BoxRow& row) {
    if (row.last <= row.first) return;
    const uint8_t* from = &store.rows[static_cast<size_t>(offset + row.first)];
    const auto bytes = static_cast<size_t>(row.last - row.first);
    if (!store.add) {
      std::memcpy(row.data, from, bytes);
      return;
    }
    for (size_t i = 0; i < bytes; i += sizeof(float)) {
      float sum, term;
      std::memcpy(&sum, row.data + i, sizeof sum);
      std::memcpy(&term, from + i, sizeof term);
      sum += term;
      std::memcpy(row.data + i, &sum, sizeof sum);
    }
  });
}

void Transfers::commit() {
  OutgoingGroups& mine = block.self().outgoing;
  mine.committed.push_back(std::move(mine.open));
  mine.open.clear();
}

void Transfers::wait(int pending, bool only_reads) {
  auto& groups = block.self().outgoing.committed;
  const auto keep = static_cast<size_t>(pending);
  if (groups.size() <= keep) return;
  const auto end = groups.end() - static_cast<ptrdiff_t>(keep);
  // What the thread does from here on comes after those reads.
  const uint32_t epoch = block.find_races() ? block.advance_warp() : 0;
  for (auto group = groups.begin(); group != end; ++group) {
    for (Outgoing& store : *group) {
      if (!store.read_over) block.async_reads().end(store.read, 0, epoch);
      store.read_over = true;
      if (!only_reads) finish(store);
    }
  }
  if (!only_reads) groups.erase(groups.begin(), end);
}

void Transfers::check_exit() {
  OutgoingGroups& mine = block.self().outgoing;
  const auto fail = [](const Outgoing& store, const char* what) {
    block.fail(Sites::location(store.site), std::string("the thread exits, and this store ") + what);
  };
  if (!mine.open.empty()) fail(mine.open.front(), "was never committed");
  for (auto& group : mine.committed) {
    for (Outgoing& store : group) {
      if (!store.read_over) fail(store, "may not have read its shared memory yet");
      late_.push_back(std::move(store));
    }
  }
  mine.committed.clear();
}

void Transfers::end_block() {
  if (!loads_.empty()) {
    const Load& load = loads_.front();
    block.fail(load.thread, Sites::location(load.site), "the block has ended, and this copy is still under way");
  }
  for (const Outgoing& store : late_) finish(store);
  late_.clear();
}

// ---- The instructions.

namespace {

const EncodedMap& decode(const TensorMap* map, int rank, const char* what, Where where) {
  if (reinterpret_cast<uintptr_t>(map) % 64 != 0) {
    block.fail(where, std::string(what) + ": the tensor map is not at a multiple of 64");
  }
  const auto* encoded = reinterpret_cast<const EncodedMap*>(map);
  if (encoded->mark != EncodedMap::kMark) {
    block.fail(where, std::string(what) + ": this is no tensor map that encode_tensor_map made");
  }
  if (encoded->rank != rank) {
    block.fail(where, std::string(what) + " of " + std::to_string(rank) + " dimensions with a tensor map of " +
                          std::to_string(encoded->rank));
  }
  return *encoded;
}

Piece box(const TensorMap* map, Coordinates at, const char* what, Where where) {
  const EncodedMap& encoded = decode(map, static_cast<int>(at.size()), what, where);
  Piece piece{&encoded, {}, nullptr, encoded.row_bytes() * encoded.rows()};
  std::copy(at.begin(), at.end(), piece.at);
  return piece;
}

Piece contiguous(const void* data, uint32_t bytes, const char* what, Where where) {
  if (bytes % kChunk != 0 || reinterpret_cast<uintptr_t>(data) % kChunk != 0 || bytes == 0) {
    block.fail(where,
               std::string(what) + " of " + std::to_string(bytes) + " bytes: size and address must be multiples of 16");
  }
  return {nullptr, {}, static_cast<uint8_t*>(const_cast<void*>(data)), static_cast<int>(bytes)};
}

}  // namespace

void prefetch_tensor_map(const TensorMap* map, Where where) {
  decode(map, reinterpret_cast<const EncodedMap*>(map)->rank, "prefetch_tensor_map", where);
}

void tensor_load(uint32_t to, const TensorMap* map, uint32_t barrier, Coordinates at, Where where) {
  block.transfers().load(box(map, at, "tensor_load", where), to, barrier, where);
}

void tensor_store(const TensorMap* map, uint32_t from, Coordinates at, Where where) {
  block.transfers().store(box(map, at, "tensor_store", where), from, /*add=*/false, where);
}

void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, Where where) {
  block.transfers().load(contiguous(from, bytes, "bulk_load", where), to, barrier, where);
}

void bulk_reduce_add(float* to, uint32_t from, uint32_t bytes, Where where) {
  block.transfers().store(contiguous(to, bytes, "bulk_reduce_add", where), from, /*add=*/true, where);
}

void bulk_commit(Where) { block.transfers().commit(); }
void bulk_wait(int pending, bool only_reads, Where) { block.transfers().wait(pending, only_reads); }

}  // namespace fastattn::cuda::sim
