#include <algorithm>
#include <cstring>
#include <string>

#include "block.h"
#include "sites.h"

namespace fastattn::cuda::sim {

namespace {

struct Range {
  uintptr_t begin, end;
  bool writable;
  std::string name;
};
std::vector<Range> ranges;

// Where the last access was found: mostly the next one is there too.
struct Found {
  size_t range = ~size_t{0};
  bool may_be_written = false;  // by this launch: the range or one that overlaps it
};
Found last_read, last_written;

bool allows(const Range& range, uintptr_t begin, uintptr_t end, bool write) {
  return range.begin <= begin && end <= range.end && (range.writable || !write);
}

// Why an access is not allowed, in terms of the range that is nearest.
std::string complaint(uintptr_t begin, uintptr_t end) {
  const Range* nearest = nullptr;
  uintptr_t least = ~uintptr_t{0};
  for (const Range& range : ranges) {
    const uintptr_t distance = begin < range.begin ? range.begin - begin : end > range.end ? end - range.end : 0;
    if (distance <= least) least = distance, nearest = &range;
  }
  if (nearest == nullptr) return "no memory is registered";
  const std::string name = (nearest->name.empty() ? "a range" : "`" + nearest->name + "`") + std::string(" of ") +
                           std::to_string(nearest->end - nearest->begin) + " bytes";
  if (least == 0) return name + " may only be read";
  const auto offset = static_cast<int64_t>(begin - nearest->begin);
  return "outside of all registered memory; the nearest is " + name + ", of which this is at offset " +
         std::to_string(offset);
}

void check_global(const void* address, int bytes, bool write, bool atomic, const char* what, Where where) {
  if (const auto past = reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes); past != 0) {
    block.fail(where, std::string("misaligned ") + what + " of " + std::to_string(bytes) +
                          " bytes of global memory, at an address that is " + std::to_string(past) +
                          " past a multiple of its size");
  }
  check_global_bytes(address, bytes, write, atomic, what, where);
}

void count_access(Access access, Where where, uint64_t address, int bytes) {
  if (block.count()) {
    block.warp().requests.access(current_position.thread % kLanes, Sites::number(where), access, address, bytes);
  }
}

}  // namespace

void check_global_bytes(const void* address, int bytes, bool write, bool atomic, const char* what, Where where) {
  const auto begin = reinterpret_cast<uintptr_t>(address), end = begin + static_cast<uintptr_t>(bytes);
  Found& last = write ? last_written : last_read;
  if (last.range >= ranges.size() || !allows(ranges[last.range], begin, end, write)) [[unlikely]] {
    const auto found =
        std::find_if(ranges.begin(), ranges.end(), [&](const Range& r) { return allows(r, begin, end, write); });
    if (found == ranges.end()) {
      block.fail(where, std::string(what) + " of " + std::to_string(bytes) +
                            " bytes of global memory: " + complaint(begin, end));
    }
    last.range = static_cast<size_t>(found - ranges.begin());
    last.may_be_written = std::any_of(ranges.begin(), ranges.end(), [&](const Range& r) {
      return r.writable && r.begin < found->end && found->begin < r.end;
    });
  }
  if (!block.find_races() || !last.may_be_written) return;
  const int thread = current_position.thread;
  const GlobalRaces::Party party{block.linear_index(), thread, block.time(thread), Sites::number(where)};
  const GlobalRaces::Conflict conflict =
      write ? block.global_races().write(party, begin, bytes, atomic) : block.global_races().read(party, begin, bytes);
  if (!conflict.found) return;
  const Range& range = ranges[last.range];
  block.fail(where, std::string("race in global memory: ") + what + " of " + std::to_string(bytes) +
                        " bytes at offset " + std::to_string(begin - range.begin) + " of " +
                        (range.name.empty() ? "a range" : "`" + range.name + "`") + " is not ordered after the " +
                        (conflict.was_write ? "write" : "read") + " by " + block.block_text(conflict.block) +
                        (conflict.several_blocks ? " and others" : "") + ", " + block.name(conflict.thread) + ", at " +
                        Sites::text(Sites::location(conflict.site)));
}

void Memory::register_range(const void* begin, size_t bytes, bool writable, std::string name) {
  const auto at = reinterpret_cast<uintptr_t>(begin);
  if (bytes == 0) return;
  ranges.push_back({at, at + bytes, writable, std::move(name)});
  last_read = last_written = Found{};
}

void Memory::unregister_range(const void* begin) {
  const auto at = reinterpret_cast<uintptr_t>(begin);
  const auto found = std::find_if(ranges.rbegin(), ranges.rend(), [at](const Range& r) { return r.begin == at; });
  if (found == ranges.rend()) return;
  ranges.erase(std::next(found).base());
  last_read = last_written = Found{};
}

void Memory::clear() {
  ranges.clear();
  last_read = last_written = Found{};
}

// ---- Shared memory.

void load_shared(void* to, uint32_t address, int bytes, Where where) {
  const int thread = current_position.thread;
  block.check_shared(thread, address, bytes, "load", where);
  block.check_readable(thread, address, bytes, "load", where);
  if (block.find_races()) {
    block.check_race(thread,
                     block.races().read(thread, block.time(thread), address - kSharedBase, bytes, Sites::number(where)),
                     address, bytes, "load", where);
  }
  std::memcpy(to, block.shared(address), static_cast<size_t>(bytes));
  count_access(Access::kSharedLoad, where, address, bytes);
}

void store_shared(uint32_t address, const void* from, int bytes, Where where) {
  const int thread = current_position.thread;
  block.check_shared(thread, address, bytes, "store", where);
  block.check_arrived(from, bytes, "store", where);
  block.begin_write(thread, address, bytes, "store", where);
  std::memcpy(block.shared(address), from, static_cast<size_t>(bytes));
  block.mark(address, bytes, kWritten);
  count_access(Access::kSharedStore, where, address, bytes);
}

// ---- Global memory.

void load_global(void* to, const void* address, int bytes, bool constant, Where where) {
  check_global(address, bytes, false, false, "load", where);
  std::memcpy(to, address, static_cast<size_t>(bytes));
  count_access(constant ? Access::kConstantLoad : Access::kGlobalLoad, where, reinterpret_cast<uintptr_t>(address),
               bytes);
}

void store_global(void* address, const void* from, int bytes, Where where) {
  block.check_arrived(from, bytes, "store", where);
  check_global(address, bytes, true, false, "store", where);
  std::memcpy(address, from, static_cast<size_t>(bytes));
  count_access(Access::kGlobalStore, where, reinterpret_cast<uintptr_t>(address), bytes);
}

namespace {

template <class V>
V add(V* address, V value, Where where) {
  check_global(address, sizeof(V), true, true, "atomic_add", where);
  count_access(Access::kAtomic, where, reinterpret_cast<uintptr_t>(address), sizeof(V));
  const V old = *address;
  *address = old + value;
  return old;
}

}  // namespace

float atomic_add(float* address, float value, Where where) { return add(address, value, where); }
int atomic_add(int* address, int value, Where where) { return add(address, value, where); }

// ---- cp.async: between issue and wait the destination holds poison and may not be touched.

void copy_async(uint32_t to, const void* from, int bytes, bool valid, Where where) {
  const int index = current_position.thread;
  block.check_shared(index, to, bytes, "asynchronous copy", where);
  block.check_write(index, to, bytes, "asynchronous copy", where);
  if (valid) check_global(from, bytes, false, false, "asynchronous copy", where);
  if (block.find_races()) {
    block.check_race(index, block.races().check_write(index, block.time(index), to - kSharedBase, bytes), to, bytes,
                     "asynchronous copy", where);
  }
  std::memset(block.shared(to), 0xFF, static_cast<size_t>(bytes));
  block.mark(to, bytes, kInFlight);
  Thread& thread = block.self();
  thread.copies.push_back({to, bytes, valid ? from : nullptr, Sites::number(where)});
  ++thread.uncommitted;
  count_access(Access::kCopyToShared, where, to, bytes);
  if (valid) count_access(Access::kCopyFromGlobal, where, reinterpret_cast<uintptr_t>(from), bytes);
}

void copy_async_commit(Where) {
  Thread& thread = block.self();
  thread.copy_groups.push_back(thread.uncommitted);
  thread.uncommitted = 0;
}

void copy_async_wait(int pending, Where where) {
  const int index = current_position.thread;
  Thread& thread = block.self();
  if (thread.copy_groups.size() <= static_cast<size_t>(pending)) return;
  const size_t groups = thread.copy_groups.size() - static_cast<size_t>(pending);
  size_t count = 0;
  for (size_t i = 0; i < groups; ++i) count += thread.copy_groups[i];
  for (size_t i = 0; i < count; ++i) {
    const PendingCopy& copy = thread.copies[i];
    if (block.find_races()) {
      block.check_race(index,
                       block.races().write(index, block.time(index), copy.to - kSharedBase, copy.bytes, copy.site),
                       copy.to, copy.bytes, "asynchronous copy", where);
    }
    if (copy.from != nullptr) {
      std::memcpy(block.shared(copy.to), copy.from, static_cast<size_t>(copy.bytes));
    } else {
      std::memset(block.shared(copy.to), 0, static_cast<size_t>(copy.bytes));
    }
    block.mark(copy.to, copy.bytes, kWritten);
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<ptrdiff_t>(count));
  thread.copy_groups.erase(thread.copy_groups.begin(), thread.copy_groups.begin() + static_cast<ptrdiff_t>(groups));
}

}  // namespace fastattn::cuda::sim
