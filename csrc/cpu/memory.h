// Memory for results, and huge pages for any.
//
// Memory that is new to the process costs a fault for every page that is written first: for a stream that takes longer than to steer it.
// The C library keeps what is freed up to some size, and hands it out again while it still lies in a cache: nothing is better. But it gives
// the end of its heap back to the system as soon as enough of it is free, in some processes at every pass. So where it has only new memory
// for a stream, the stream's memory is taken from the system, in huge pages, and kept here for the next results of about the size.
#pragma once

#include <cstdint>

namespace steer::cpu {

struct Block {
  void* data;
  std::int64_t size;
  bool kept;  // here, once it comes back
};

// Room for `bytes` or somewhat more, aligned to a cache line, uninitialised. Null where there is none, even with all that is kept given up.
Block take_block(std::int64_t bytes);

// Gives back a block that was taken. From any thread.
void give_back(Block block) noexcept;

// Bytes kept for later at the moment; their limit is STEERMOE_KEEP_MB megabytes (256), 0 keeps none.
std::int64_t kept_bytes();

// Asks the system to back `bytes` from `first` on with pages of 2 MB. What is too short for them is left alone, and a refusal changes
// nothing. `first` may be null.
void prefer_huge_pages(void* first, std::int64_t bytes);

}  // namespace steer::cpu
