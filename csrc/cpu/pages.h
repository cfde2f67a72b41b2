// Large results on large pages.
//
// A result of megabytes is memory that the system hands out fresh, page by page as it is first written, and for a stream these faults take
// longer than the kernel that writes it. Where the system gives pages of 2 MB to those that ask (Linux's usual setting), a stream that asks
// for them has hundreds of faults fewer.
#pragma once

#include <cstdint>

namespace steer::cpu {

// Asks for large pages behind the `bytes` from `first` on, where that is worth a system call. Memory that is already there stays as it is;
// a refusal changes nothing. `first` may be null.
void prefer_large_pages(void* first, std::int64_t bytes);

}  // namespace steer::cpu
