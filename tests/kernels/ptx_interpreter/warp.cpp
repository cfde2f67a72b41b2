#include "warp.h"

#include <algorithm>
#include <cstring>

namespace ptx {

Warp::Warp(Block& block, int index) : block_(block), index_(index), registers_(block.kernel.registers), unknown_(block.kernel.registers) {
  for (const auto& [reg, value] : block.kernel.constants) registers_[reg].fill(value);
}

void Warp::start() {
  std::fill(unknown_.begin(), unknown_.end(), Unknown());
  for (const auto& [reg, value] : block_.kernel.constants) unknown_[reg] = {0, 0};
  const Grid& grid = block_.grid;
  for (const auto& [reg, special] : block_.kernel.specials) {
    const std::uint32_t of_block[] = {
        0, block_.index % grid.x, block_.index / grid.x % grid.y, block_.index / grid.x / grid.y, grid.x, grid.y, grid.z};
    for (int lane = 0; lane < kWarpSize; ++lane)
      registers_[reg][lane] = special == Special::kThread ? index_ * kWarpSize + lane : of_block[static_cast<int>(special)];
    unknown_[reg] = {0, 0};
  }
  alive_ = kAllLanes;
  parties_ = {{0, kAllLanes, false}};
  ++turn_;
  groups_.fill(0);
}

void Warp::run() {
  while (alive_ != 0) {
    join();
    const auto first = std::find_if(parties_.begin(), parties_.end(), [](const Party& party) { return !party.waiting; });
    if (first == parties_.end()) fail_to_meet();
    Party& party = *first;
    // So far, and then it meets others.
    const int next = first + 1 == parties_.end() ? static_cast<int>(block_.kernel.instructions.size()) : (first + 1)->at;
    for (bool together = true; together;) {
      const Instruction& instruction = block_.kernel.instructions[party.at];
      const Lanes lanes = guarded(instruction, party.lanes);
      const Outcome outcome = lanes == 0 ? Outcome::kNext : execute(instruction, lanes);
      switch (outcome) {
        case Outcome::kNext:
          together = ++party.at < next;
          break;
        case Outcome::kJump:
          if (lanes == party.lanes) {
            // A party that goes back is no longer the one to wait for.
            together = instruction.target > party.at && instruction.target < next;
            party.at = instruction.target;
          } else {
            party.lanes &= ~lanes, ++party.at;
            parties_.push_back({instruction.target, lanes, false});
            together = false;
          }
          break;
        case Outcome::kWaitForLanes:
          if (lanes != party.lanes) throw Fault("some lanes alone at what takes the warp: " + block_.kernel.place(instruction));
          party.waiting = true;
          together = false;
          break;
        case Outcome::kWaitForBarrier:
          ++party.at;
          return;
        case Outcome::kExit:
          alive_ &= ~lanes, party.lanes &= ~lanes, ++party.at;
          for (Party& other : parties_) other.waiting = false;  // perhaps for nobody else now
          together = false;
          break;
      }
    }
  }
  for (const std::vector<Copy>& copies : copies_)
    if (!copies.empty()) throw Fault("a copy that nobody waits for: " + block_.kernel.place(*copies.front().instruction));
}

Outcome Warp::execute(const Instruction& instruction, Lanes lanes) {
  try {
    return instruction.operation->execute(*this, instruction, lanes);
  } catch (const std::domain_error& error) {  // of numbers, which know no place
    throw Fault(error.what() + (": " + block_.kernel.place(instruction)));
  }
}

void Warp::join() {
  std::sort(parties_.begin(), parties_.end(), [](const Party& a, const Party& b) { return a.at < b.at; });
  std::vector<Party> joined;
  for (const Party& party : parties_) {
    if (party.lanes == 0) continue;
    if (!joined.empty() && joined.back().at == party.at)
      joined.back().lanes |= party.lanes, joined.back().waiting = false;
    else
      joined.push_back(party);
  }
  parties_ = std::move(joined);
}

Lanes Warp::guarded(const Instruction& instruction, Lanes lanes) const {
  if (instruction.guard < 0) return lanes;
  require_known(instruction, instruction.guard, lanes, "decides");
  Lanes set = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) set |= static_cast<Lanes>(registers_[instruction.guard][lane] & 1) << lane;
  return lanes & (instruction.guard_negated ? ~set : set);
}

void Warp::require_known(const Instruction& instruction, int reg, Lanes lanes, const char* what) const {
  if ((unknown_[reg].either() & lanes) != 0)
    throw Fault(std::string("a number that was never written ") + what + ": " + block_.kernel.place(instruction));
}

void Warp::start_copy(const Instruction& instruction, int lane, std::uint64_t to, std::uint64_t from, int bytes) {
  const Access mine = access(instruction, lane);
  block_.shared.check(mine, to, bytes);
  block_.global.check_read(visit(instruction), from, bytes, false);
  for (int at = 0; at < bytes; at += 4) block_.shared.start_copy(mine, to + at);
  copies_[lane].push_back({&instruction, to, from, bytes, groups_[lane]});
}

void Warp::wait_for_copies(int lane, unsigned pending) {
  std::vector<Copy>& copies = copies_[lane];
  const auto due = [&](const Copy& copy) { return copy.group + pending < groups_[lane]; };
  for (const Copy& copy : copies) {
    if (!due(copy)) continue;
    for (int at = 0; at < copy.bytes; at += 4) {
      std::uint32_t bits;
      std::memcpy(&bits, reinterpret_cast<const void*>(copy.from + at), 4);
      block_.shared.land(access(*copy.instruction, lane), copy.to + at, bits);
    }
  }
  copies.erase(std::remove_if(copies.begin(), copies.end(), due), copies.end());
}

void Warp::fail_to_meet() const {
  std::string where;
  for (const Party& party : parties_) where += "; " + block_.kernel.place(block_.kernel.instructions[party.at]);
  throw Fault("lanes of a warp wait for each other at different places" + where);
}

}  // namespace ptx
