#include "global_memory.h"

#include <cstring>

namespace ptx {

namespace {

unsigned launches = 0;

}  // namespace

GlobalMemory::GlobalMemory(const Kernel& kernel, std::vector<Region> regions)
    : kernel_(kernel), regions_(std::move(regions)), launch_(++launches) {}

void GlobalMemory::check_read(const Visit& visit, std::uint64_t address, std::size_t bytes, bool through_read_only_cache) {
  const Region& region = region_of(visit, address, bytes);
  if (through_read_only_cache && region.writable) fail(visit, "a read of " + region.name + ", which the kernel writes, as of a constant");
  if (region.history == nullptr) return;
  for (std::uint64_t at = (address - region.start) / kPiece; at * kPiece < address - region.start + bytes; ++at) {
    const Written& last = (*region.history)[at];
    if (last.launch == 0) fail(visit, "a read of " + region.name + " where nothing was written");
    if (last.launch != launch_) continue;
    if (last.block != visit.block) fail(visit, "a read of " + region.name + " that another block writes");
    if (last.warp != visit.warp && last.turn == visit.turn)
      fail(visit, "a read of " + region.name + " that another warp has written since the last barrier");
  }
}

void GlobalMemory::check_write(const Visit& visit, std::uint64_t address, std::size_t bytes, const void* values) {
  const Region& region = region_of(visit, address, bytes);
  if (!region.writable) fail(visit, "a write to " + region.name + ", which is not the kernel's to write");
  const bool same = std::memcmp(reinterpret_cast<const void*>(address), values, bytes) == 0;
  for (std::uint64_t at = (address - region.start) / kPiece; at * kPiece < address - region.start + bytes; ++at) {
    Written& last = (*region.history)[at];
    if (last.launch == launch_ && last.block != visit.block) fail(visit, "a write to " + region.name + " that another block writes");
    if (last.launch == launch_ && last.warp != visit.warp && last.turn == visit.turn && !same)
      fail(visit, "a write to " + region.name + " that another warp has written since the last barrier");
    last = {launch_, visit.turn, visit.block, visit.warp};
  }
}

Region& GlobalMemory::region_of(const Visit& visit, std::uint64_t address, std::size_t bytes) {
  if (address % bytes != 0) fail(visit, "an access to global memory that is not aligned to its " + std::to_string(bytes) + " bytes");
  const auto holds = [&](const Region& region) { return address >= region.start && address + bytes <= region.start + region.bytes; };
  if (last_ < regions_.size() && holds(regions_[last_])) return regions_[last_];
  for (last_ = 0; last_ < regions_.size(); ++last_)
    if (holds(regions_[last_])) return regions_[last_];
  std::string nearest = "nothing";
  std::uint64_t distance = ~std::uint64_t{0};
  for (const Region& region : regions_)
    if (address >= region.start && address - region.start < distance) {
      distance = address - region.start;
      nearest = "byte " + std::to_string(distance) + " of " + region.name + ", which has " + std::to_string(region.bytes);
    }
  fail(visit, "an access to global memory past all that the kernel was given, at " + nearest);
}

void GlobalMemory::fail(const Visit& visit, const std::string& what) const { throw Fault(what + ": " + kernel_.place(*visit.instruction)); }

}  // namespace ptx
