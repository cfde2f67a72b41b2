// Branches, barriers, shuffles.
#include <algorithm>

#include "instructions.h"

namespace ptx {

namespace {

// Lane k receives what lane k ^ mask brings, of a whole warp.
Outcome shuffle(Warp& warp, const Instruction& instruction, Lanes lanes) {
  if (lanes != kAllLanes) return Outcome::kWaitForLanes;
  const int from = instruction.sources[0], to = instruction.destinations[0];
  for (std::size_t k = 1; k < instruction.sources.size(); ++k)
    warp.require_known(instruction, instruction.sources[k], lanes, "says who takes part in a shuffle");
  const std::uint64_t *brought = warp.values(from), *masks = warp.values(instruction.sources[1]);
  // The third operand bounds the lanes that exchange: 31, no bound. The fourth names who takes part.
  if (warp.values(instruction.sources[2])[0] != kWarpSize - 1 || static_cast<Lanes>(warp.values(instruction.sources[3])[0]) != kAllLanes)
    throw std::domain_error("a shuffle of a part of a warp, which is not understood");
  std::array<std::uint64_t, kWarpSize> received;
  const Unknown before = warp.unknown(from);
  Unknown unknown{0, 0};
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int other = lane ^ static_cast<int>(masks[lane] & (kWarpSize - 1));
    received[lane] = brought[other];
    unknown.low |= (before.low >> other & 1) << lane, unknown.high |= (before.high >> other & 1) << lane;
  }
  std::copy(received.begin(), received.end(), warp.values(to));
  warp.set_unknown(to, lanes, unknown);
  return Outcome::kNext;
}

Outcome sync_warp(Warp& warp, const Instruction& instruction, Lanes lanes) {
  if (static_cast<Lanes>(warp.values(instruction.sources[0])[0]) != kAllLanes)
    throw std::domain_error("a barrier of a part of a warp, which is not understood");
  if (lanes != kAllLanes) return Outcome::kWaitForLanes;
  warp.sync();
  return Outcome::kNext;
}

Outcome sync_block(Warp& warp, const Instruction& instruction, Lanes lanes) {
  if (warp.values(instruction.sources[0])[0] != 0) throw std::domain_error("a barrier with a number, which is not understood");
  return lanes == kAllLanes ? Outcome::kWaitForBarrier : Outcome::kWaitForLanes;
}

}  // namespace

void add_control(Table& table) {
  table["bra"] = table["bra.uni"] = {Form::kBranch, [](Warp&, const Instruction&, Lanes) { return Outcome::kJump; }};
  table["ret"] = {Form::kNone, [](Warp&, const Instruction&, Lanes) { return Outcome::kExit; }};
  table["shfl.sync.bfly.b32"] = {Form::kDestination, shuffle};
  table["bar.warp.sync"] = {Form::kSources, sync_warp};
  table["bar.sync"] = {Form::kSources, sync_block};
}

const std::map<std::string, Operation>& operations() {
  static const Table table = [] {
    Table made;
    for (const auto add : {add_arithmetic, add_conversions, add_comparisons, add_control, add_memory, add_tensor_cores}) add(made);
    return made;
  }();
  return table;
}

}  // namespace ptx
