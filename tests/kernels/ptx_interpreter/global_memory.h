// The global memory that a kernel may touch: its operands, results and workspace, to the byte.
//
// Blocks run in any order, so that no block may touch what another writes in the same launch, and the warps of one block need a barrier in
// between, as in shared memory. Two may write the same bits. What was never written may not be read, and all of a result has to be written.
#pragma once

#include <memory>

#include "kernel.h"

namespace ptx {

// Who last wrote a piece of memory.
struct Written {
  unsigned launch = 0, turn = 0;
  std::uint32_t block = 0;
  int warp = 0;
};
constexpr std::size_t kPiece = 2;  // bytes: a stream's shortest numbers
using History = std::vector<Written>;

struct Region {
  std::string name;
  std::uint64_t start = 0, bytes = 0;
  bool writable = false;
  std::shared_ptr<History> history;  // of what kernels write; an operand has none
};

// What a warp's lane is at, for telling who came between.
struct Visit {
  const Instruction* instruction;
  std::uint32_t block;
  int warp;
  unsigned turn;  // barriers that the block has passed
};

class GlobalMemory {
 public:
  GlobalMemory(const Kernel& kernel, std::vector<Region> regions);

  // Fault unless the access is allowed; reading or writing is then the caller's.
  void check_read(const Visit& visit, std::uint64_t address, std::size_t bytes, bool through_read_only_cache);
  void check_write(const Visit& visit, std::uint64_t address, std::size_t bytes, const void* values);

 private:
  Region& region_of(const Visit& visit, std::uint64_t address, std::size_t bytes);
  [[noreturn]] void fail(const Visit& visit, const std::string& what) const;

  const Kernel& kernel_;
  std::vector<Region> regions_;
  std::size_t last_ = 0;  // where the last access was
  unsigned launch_;
};

}  // namespace ptx
