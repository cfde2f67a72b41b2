#include "pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace steer::cpu {

#if defined(__linux__) && defined(MADV_HUGEPAGE)

void prefer_large_pages(void* first, std::int64_t bytes) {
  constexpr std::int64_t kLarge = 2 << 20;
  if (first == nullptr || bytes < 2 * kLarge) return;  // from here on, one whole large page lies inside wherever the memory begins
  static const std::uintptr_t page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t from = (reinterpret_cast<std::uintptr_t>(first) + page - 1) / page * page;
  const std::uintptr_t to = (reinterpret_cast<std::uintptr_t>(first) + static_cast<std::uintptr_t>(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
}

#else

void prefer_large_pages(void*, std::int64_t) {}

#endif

}  // namespace steer::cpu
