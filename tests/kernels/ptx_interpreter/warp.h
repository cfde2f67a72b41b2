// A warp: 32 threads with a register file of their own, some of which may be elsewhere in the program than others.
//
// Threads that stand at the same instruction go on together. Those that are furthest behind go first, so that the branches of a condition
// meet again behind it; an instruction that takes the whole warp waits until all are there, and if they never come, that is a Fault.
//
// A register, or a part of it, that comes of what was never written is unknown, and so is what is computed of it. That is no fault: the
// kernels read rows and columns that do not exist along with those that do. It becomes one where an unknown number decides something, is an
// address, or goes to a result.
#pragma once

#include "global_memory.h"
#include "kernel.h"
#include "shared_memory.h"

namespace ptx {

// The lanes in which a register's lower 16 bits are unknown, and those in which its others are.
struct Unknown {
  Lanes low = kAllLanes, high = kAllLanes;
  Lanes either() const { return low | high; }
};

struct Grid {
  std::uint32_t x = 1, y = 1, z = 1;
  std::uint32_t size() const { return x * y * z; }
};

// What the warps of a block have in common.
struct Block {
  const Kernel& kernel;
  const std::vector<unsigned char>& parameters;
  Grid grid;
  int warps;
  SharedMemory& shared;
  GlobalMemory& global;
  std::uint32_t index = 0;
  unsigned turn = 0;  // barriers passed
};

class Warp {
 public:
  Warp(Block& block, int index);

  // From the kernel's first instruction, in the block that `block` now is.
  void start();
  // Goes on until the warp stands at a barrier of the block, or has ended.
  void run();
  bool ended() const { return alive_ == 0; }

  // --- for the instructions
  Block& block() { return block_; }
  std::uint64_t* values(int reg) { return registers_[reg].data(); }
  const Unknown& unknown(int reg) const { return unknown_[reg]; }
  void set_unknown(int reg, Lanes lanes, Unknown unknown) {
    unknown_[reg] = {(unknown_[reg].low & ~lanes) | (unknown.low & lanes), (unknown_[reg].high & ~lanes) | (unknown.high & lanes)};
  }
  void set_known(int reg, Lanes lanes) { set_unknown(reg, lanes, {0, 0}); }
  void require_known(const Instruction& instruction, int reg, Lanes lanes, const char* what) const;
  void sync() { ++turn_; }  // the lanes have met at a barrier, of the warp or of the block
  Access access(const Instruction& instruction, int lane) const { return {&instruction, index_, lane, turn_}; }
  Visit visit(const Instruction& instruction) const { return {&instruction, block_.index, index_, block_.turn}; }

  void start_copy(const Instruction& instruction, int lane, std::uint64_t to, std::uint64_t from, int bytes);
  void commit_copies(int lane) { ++groups_[lane]; }
  // Lands what this lane has committed, but for the latest `pending` groups.
  void wait_for_copies(int lane, unsigned pending);

 private:
  struct Copy {
    const Instruction* instruction;
    std::uint64_t to, from;
    int bytes;
    unsigned group;
  };
  // Lanes at the same place.
  struct Party {
    int at;
    Lanes lanes;
    bool waiting;
  };

  void join();
  Outcome execute(const Instruction& instruction, Lanes lanes);
  Lanes guarded(const Instruction& instruction, Lanes lanes) const;
  [[noreturn]] void fail_to_meet() const;

  Block& block_;
  const int index_;
  std::vector<std::array<std::uint64_t, kWarpSize>> registers_;
  std::vector<Unknown> unknown_;
  std::vector<Party> parties_;
  Lanes alive_ = 0;
  unsigned turn_ = 0;
  std::array<std::vector<Copy>, kWarpSize> copies_;
  std::array<unsigned, kWarpSize> groups_{};
};

}  // namespace ptx
