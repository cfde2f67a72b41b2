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
constexpr std::int64_t kLine = 64, kUnit = 64 << 10;  // what blocks are a multiple of, from the C library and from the system
constexpr std::int64_t kLargestLeft = 1 << 20;        // to the C library, whatever it has
constexpr std::int64_t kLargestAsked = 32 << 20;      // from glibc, which never keeps more

std::int64_t rounded(std::int64_t bytes, std::int64_t unit) { return (bytes + unit - 1) / unit * unit; }

std::int64_t limit() {
  static const std::int64_t bytes = [] {
    const char* megabytes = std::getenv("STEERMOE_KEEP_MB");
    constexpr std::int64_t kMost = 1LL << 40;  // an exabyte, whose bytes can be counted
    return std::clamp<std::int64_t>(megabytes == nullptr ? 256 : std::atoll(megabytes), 0, kMost) << 20;
  }();
  return bytes;
}

// Whether a result of this size is kept once it comes back.
bool may_be_kept(std::int64_t bytes) { return bytes > kLargestLeft && bytes <= limit(); }

// Pages of the system's, from the start of a huge one on. Not from the C library's heap, which such blocks would leave full of gaps.
#if defined(__linux__)

void* map_pages(std::int64_t size) {
  void* all = mmap(nullptr, static_cast<std::size_t>(size + kHugePage), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) return nullptr;
  char* const start = static_cast<char*>(all);
  const std::int64_t before = -reinterpret_cast<std::intptr_t>(start) & (kHugePage - 1), after = kHugePage - before;
  if (before > 0) munmap(start, static_cast<std::size_t>(before));
  munmap(start + before + size, static_cast<std::size_t>(after));
  return start + before;
}

void unmap_pages(void* data, std::int64_t size) { munmap(data, static_cast<std::size_t>(size)); }

// Whether a block is backed by memory already, judged by some of its pages.
bool is_resident(const Block& block) {
  static const std::int64_t page = sysconf(_SC_PAGESIZE);
  constexpr int kSamples = 8;
  for (int i = 0; i <= kSamples; ++i) {
    const std::uintptr_t at = reinterpret_cast<std::uintptr_t>(block.data) + static_cast<std::uintptr_t>((block.size - 1) * i / kSamples);
    unsigned char there = 0;
    if (mincore(reinterpret_cast<void*>(at / page * page), static_cast<std::size_t>(page), &there) != 0 || (there & 1) == 0) return false;
  }
  return true;
}

#else

void* map_pages(std::int64_t size) { return std::aligned_alloc(kUnit, static_cast<std::size_t>(size)); }

void unmap_pages(void* data, std::int64_t) { std::free(data); }

bool is_resident(const Block&) { return true; }

#endif

Block allocate(std::int64_t bytes) {
  const std::int64_t size = std::max(kLine, rounded(bytes, kLine));
  void* data = std::aligned_alloc(kLine, static_cast<std::size_t>(size));
  if (size > kLargestAsked) prefer_huge_pages(data, size);
  return {data, size, false};
}

Block map_block(std::int64_t bytes) {
  const std::int64_t size = rounded(bytes, kUnit);
  void* data = map_pages(size);
  prefer_huge_pages(data, size);
  return {data, size, true};
}

void free_block(const Block& block) {
  if (block.kept)
    unmap_pages(block.data, block.size);
  else
    std::free(block.data);
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
    if (!lock.owns_lock()) return false;
    try {
      blocks.push_back(block);
    } catch (const std::bad_alloc&) {
      return false;
    }
    for (total += block.size; total > limit(); blocks.erase(blocks.begin())) {
      total -= blocks.front().size;
      free_block(blocks.front());
    }
    return true;
  }

  void clear() {
    const std::unique_lock<std::mutex> lock(guard, std::try_to_lock);
    if (!lock.owns_lock()) return;
    for (const Block& kept : blocks) free_block(kept);
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
  const bool may_keep = may_be_kept(bytes);
  Block block;
  if (!may_keep || bytes <= kLargestAsked) {
    block = allocate(bytes);
    if (block.data != nullptr && (!may_keep || is_resident(block))) return block;
    free_block(block);
  }
  if (may_keep && store().find(bytes, block)) return block;
  if (may_keep) block = map_block(bytes);
  if (!may_keep || block.data == nullptr) {
    store().clear();
    block = allocate(bytes);
  }
  return block;
}

void give_back(Block block) noexcept {
  if (!block.kept || !store().keep(block)) free_block(block);
}

std::int64_t kept_bytes() {
  const std::lock_guard<std::mutex> lock(store().guard);
  return store().total;
}

#if defined(__linux__) && defined(MADV_HUGEPAGE)

void prefer_huge_pages(void* first, std::int64_t bytes) {
  static const std::uintptr_t page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto round_up = [start = reinterpret_cast<std::uintptr_t>(first)](std::uintptr_t unit) { return (start + unit - 1) / unit * unit; };
  const std::uintptr_t from = round_up(page),
                       to = (reinterpret_cast<std::uintptr_t>(first) + static_cast<std::uintptr_t>(bytes)) / page * page;
  if (first == nullptr || round_up(kHugePage) + kHugePage > to) return;  // no whole huge page lies inside
  madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
}

#else

void prefer_huge_pages(void*, std::int64_t) {}

#endif

}  // namespace steer::cpu
