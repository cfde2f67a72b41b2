// A block's shared memory, and whether its threads use it as they may.
//
// Between two barriers of the block, what one warp writes no other may touch, and what one reads no other may write; between two barriers
// of a warp, the same holds for its lanes. A tensor core's product or a shuffle, which a warp's lanes do together, is no barrier. What an
// asynchronous copy brings is there when its thread has waited for it, not a moment before: that is when it lands here, and until then the
// place may not be touched. A word that was never written is unknown, which is the reader's to remember.
#pragma once

#include "kernel.h"

namespace ptx {

// A lane's access, at a time that its warp and its block count in barriers.
struct Access {
  const Instruction* instruction;
  int warp, lane;
  unsigned warp_turn;
};

class SharedMemory {
 public:
  explicit SharedMemory(const Kernel& kernel, std::size_t bytes) : kernel_(kernel), bytes_(bytes), words_((bytes + 3) / 4) {}

  void start_block() { block_start_ = ++turn_; }
  void pass_barrier() { ++turn_; }

  // Faults unless `bytes` from `address` on exist and are aligned to their number.
  void check(const Access& access, std::uint64_t address, std::size_t bytes) const;

  struct Value {
    std::uint32_t bits;
    bool low_unknown, high_unknown;  // its halves, which may be numbers of 16 bits
  };
  // By all of `lanes`: a matrix row is read for the whole warp.
  Value read(const Access& access, std::uint64_t address, Lanes lanes);
  void write(const Access& access, std::uint64_t address, Value value);
  void start_copy(const Access& access, std::uint64_t address);
  void land(const Access& access, std::uint64_t address, std::uint32_t bits);

 private:
  struct Word {
    Value value{};
    int copies = 0;  // under way to this place
    // The last write.
    unsigned write_turn = 0, write_warp_turn = 0;
    int writer_warp = 0, writer_lane = 0;
    const Instruction* writer = nullptr;
    // The reads since the last barrier: which warps', and the last one's lanes since its own last barrier.
    unsigned read_turn = 0, read_warp_turn = 0;
    std::uint32_t reader_warps = 0;
    int reader_warp = 0;
    Lanes reader_lanes = 0;
    const Instruction* reader = nullptr;
  };

  // Faults if anybody else has written, or read, the word since the last barrier that both passed.
  void check_writes(const Access& access, const Word& word, Lanes lanes, const char* what) const;
  void check_reads(const Access& access, const Word& word) const;
  void check_copies(const Access& access, const Word& word, const char* what) const;
  void set(const Access& access, Word& word, Value value);
  [[noreturn]] void fail(const Access& access, const std::string& what, const Instruction* other = nullptr) const;

  const Kernel& kernel_;
  std::size_t bytes_;
  std::vector<Word> words_;
  unsigned turn_ = 0, block_start_ = 0;
};

}  // namespace ptx
