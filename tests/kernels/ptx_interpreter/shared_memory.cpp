#include "shared_memory.h"

namespace ptx {

void SharedMemory::check(const Access& access, std::uint64_t address, std::size_t bytes) const {
  if (address % bytes != 0) fail(access, "an access to shared memory that is not aligned to its " + std::to_string(bytes) + " bytes");
  if (address + bytes > bytes_)
    fail(access, "an access past the block's shared memory: byte " + std::to_string(address) + " of " + std::to_string(bytes_));
}

SharedMemory::Value SharedMemory::read(const Access& access, std::uint64_t address, Lanes lanes) {
  Word& word = words_[address / 4];
  check_copies(access, word, "a read of shared memory where a copy is under way");
  if (word.write_turn < block_start_) return {0xffffffffu, true, true};  // a NaN, of every type
  check_writes(access, word, lanes, "a read of shared memory");
  if (word.read_turn != turn_) word.reader_warps = 0;
  if (word.read_turn != turn_ || word.reader_warp != access.warp || word.read_warp_turn != access.warp_turn) word.reader_lanes = 0;
  word.read_turn = turn_, word.read_warp_turn = access.warp_turn;
  word.reader_warps |= 1u << access.warp, word.reader_warp = access.warp, word.reader_lanes |= lanes;
  word.reader = access.instruction;
  return word.value;
}

void SharedMemory::write(const Access& access, std::uint64_t address, Value value) {
  Word& word = words_[address / 4];
  check_copies(access, word, "a write to shared memory where a copy is under way");
  check_writes(access, word, Lanes{1} << access.lane, "a write to shared memory");
  check_reads(access, word);
  set(access, word, value);
}

void SharedMemory::start_copy(const Access& access, std::uint64_t address) {
  Word& word = words_[address / 4];
  check_copies(access, word, "a copy to shared memory where another is under way");
  check_writes(access, word, Lanes{1} << access.lane, "a copy to shared memory");
  check_reads(access, word);
  ++word.copies;
}

void SharedMemory::land(const Access& access, std::uint64_t address, std::uint32_t bits) {
  Word& word = words_[address / 4];
  --word.copies;
  set(access, word, {bits, false, false});
}

void SharedMemory::set(const Access& access, Word& word, Value value) {
  word.value = value;
  word.write_turn = turn_, word.write_warp_turn = access.warp_turn;
  word.writer_warp = access.warp, word.writer_lane = access.lane, word.writer = access.instruction;
}

void SharedMemory::check_writes(const Access& access, const Word& word, Lanes lanes, const char* what) const {
  if (word.write_turn != turn_) return;
  if (word.writer_warp != access.warp)
    fail(access, std::string(what) + " that another warp has written since the last barrier", word.writer);
  if (word.write_warp_turn == access.warp_turn && (lanes & ~(Lanes{1} << word.writer_lane)) != 0)
    fail(access, std::string(what) + " that another lane has written since the warp's last barrier", word.writer);
}

void SharedMemory::check_reads(const Access& access, const Word& word) const {
  if (word.read_turn != turn_) return;
  if ((word.reader_warps & ~(1u << access.warp)) != 0)
    fail(access, "a write to shared memory that another warp has read since the last barrier", word.reader);
  if (word.reader_warp == access.warp && word.read_warp_turn == access.warp_turn && (word.reader_lanes & ~(Lanes{1} << access.lane)) != 0)
    fail(access, "a write to shared memory that another lane has read since the warp's last barrier", word.reader);
}

void SharedMemory::check_copies(const Access& access, const Word& word, const char* what) const {
  if (word.copies > 0) fail(access, what);
}

void SharedMemory::fail(const Access& access, const std::string& what, const Instruction* other) const {
  throw Fault(what + ": " + kernel_.place(*access.instruction) + (other == nullptr ? "" : "; before that: " + kernel_.place(*other)));
}

}  // namespace ptx
