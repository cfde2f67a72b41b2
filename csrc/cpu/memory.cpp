#include "memory.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace steer::cpu {

namespace {

constexpr std::int64_t kHugePage = 2 << 20;
constexpr std::int64_t kSmallestKept = 32 << 20;  // of glibc, which never keeps more

std::int64_t rounded(std::int64_t bytes, std::int64_t unit) { return (bytes + unit - 1) / unit * unit; }

Block new_block(std::int64_t bytes) {
  const std::int64_t alignment = bytes < kSmallestKept ? 64 : kHugePage, size = std::max(alignment, rounded(bytes, alignment));
  void* data = std::aligned_alloc(static_cast<std::size_t>(alignment), static_cast<std::size_t>(size));
  prefer_huge_pages(data, size);
  return {data, size};
}

std::int64_t limit() {
  static const std::int64_t bytes = [] {
    const char* megabytes = std::getenv("STEERMOE_KEEP_MB");
    constexpr std::int64_t kMost = 1LL << 40;  // an exabyte, whose bytes can be counted
    return std::clamp<std::int64_t>(megabytes == nullptr ? 256 : std::atoll(megabytes), 0, kMost) << 20;
  }();
  return bytes;
}

// In the order in which blocks came back. Who finds it locked does without: so nobody waits, and a process that was forked while another
// thread held the lock does not wait forever.
struct Store {
  std::mutex guard;
  std::vector<Block> blocks;
  std::int64_t total = 0;

  bool find(std::int64_t bytes, Block& found) {
    const std::unique_lock<std::mutex> lock(guard, std::try_to_lock);
    if (!lock.owns_lock()) return false;
    // The latest is the likeliest to lie in a cache. Blocks much too large wait for results of their own size.
    for (auto kept = blocks.rbegin(); kept != blocks.rend(); ++kept)
      if (kept->size >= bytes && kept->size <= bytes + bytes / 4) {
        found = *kept;
        total -= kept->size;
        blocks.erase(std::next(kept).base());
        return true;
      }
    return false;
  }

  bool keep(Block block) {
    const std::unique_lock<std::mutex> lock(guard, std::try_to_lock);
    if (!lock.owns_lock() || block.size > limit()) return false;
    try {
      blocks.push_back(block);
    } catch (const std::bad_alloc&) {
      return false;
    }
    for (total += block.size; total > limit(); blocks.erase(blocks.begin())) {
      total -= blocks.front().size;
      std::free(blocks.front().data);
    }
    return true;
  }

  void clear() {
    const std::unique_lock<std::mutex> lock(guard, std::try_to_lock);
    if (!lock.owns_lock()) return;
    for (const Block& kept : blocks) std::free(kept.data);
    blocks.clear();
    total = 0;
  }
};

Store& store() {
  static Store* const forever = new Store;  // tensors may die after static objects do
  return *forever;
}

}  // namespace

Block take_block(std::int64_t bytes) {
  Block block;
  if (bytes >= kSmallestKept && store().find(bytes, block)) return block;
  block = new_block(bytes);
  if (block.data == nullptr) {
    store().clear();
    block = new_block(bytes);
  }
  return block;
}

void give_back(Block block) noexcept {
  if (block.size < kSmallestKept || !store().keep(block)) std::free(block.data);
}

std::int64_t kept_bytes() {
  const std::lock_guard<std::mutex> lock(store().guard);
  return store().total;
}

#if defined(__linux__) && defined(MADV_HUGEPAGE)

void prefer_huge_pages(void* first, std::int64_t bytes) {
  if (first == nullptr || bytes < 2 * kHugePage) return;  // from here on, one whole huge page lies inside wherever the memory begins
  static const std::uintptr_t page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t from = (reinterpret_cast<std::uintptr_t>(first) + page - 1) / page * page;
  const std::uintptr_t to = (reinterpret_cast<std::uintptr_t>(first) + static_cast<std::uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
}

#else

void prefer_huge_pages(void*, std::int64_t) {}

#endif

}  // namespace steer::cpu
