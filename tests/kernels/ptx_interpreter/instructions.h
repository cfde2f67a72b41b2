// What instructions do, by their names. Each file adds those of its subject.
#pragma once

#include <cstring>

#include "warp.h"

namespace ptx {

using Table = std::map<std::string, Operation>;

void add_arithmetic(Table& table);
void add_conversions(Table& table);
void add_comparisons(Table& table);
void add_control(Table& table);  // branches, barriers, shuffles
void add_memory(Table& table);
void add_tensor_cores(Table& table);

// A register's bits as a number, and back. Registers are 64 bits wide, and shorter numbers lie in the low ones.
template <typename T>
T number_of(std::uint64_t bits) {
  T number;
  std::memcpy(&number, &bits, sizeof(T));
  return number;
}
template <typename T>
std::uint64_t bits_of(T number) {
  std::uint64_t bits = 0;
  std::memcpy(&bits, &number, sizeof(T));
  return bits;
}
// The one NaN that arithmetic in float32 makes.
inline float as_computed(float number) { return number != number ? number_of<float>(0x7fffffffu) : number; }

inline float from_half(std::uint16_t bits) { return static_cast<float>(number_of<_Float16>(bits)); }
inline float from_bfloat16(std::uint16_t bits) { return number_of<float>(static_cast<std::uint32_t>(bits) << 16); }

// `work(lane)` for each of `lanes`. All of them is the usual case, and one that the compiler can take several at a time.
template <typename Work>
void for_each(Lanes lanes, Work work) {
  if (lanes == kAllLanes)
    for (int lane = 0; lane < kWarpSize; ++lane) work(lane);
  else
    for (int lane = 0; lane < kWarpSize; ++lane)
      if (lanes >> lane & 1) work(lane);
}

// An instruction that computes a Result of its Sources in each lane by itself, unknown where one of them is.
template <typename Result, typename... Sources, typename Function, std::size_t... Index>
void compute(Warp& warp, const Instruction& instruction, Lanes lanes, Function function, std::index_sequence<Index...>) {
  if (instruction.sources.size() != sizeof...(Sources)) throw Fault("an instruction's operands are not understood: " + instruction.text);
  const std::array<const std::uint64_t*, sizeof...(Sources)> sources{warp.values(instruction.sources[Index])...};
  std::uint64_t* const results = warp.values(instruction.destinations[0]);
  for_each(lanes, [&](int lane) { results[lane] = bits_of<Result>(function(number_of<Sources>(sources[Index][lane])...)); });
  const Lanes unknown = (warp.unknown(instruction.sources[Index]).either() | ...);
  warp.set_unknown(instruction.destinations[0], lanes, {unknown, unknown});
}
template <typename Result, typename... Sources, typename Function>
Operation lanewise(Function function) {
  return {Form::kDestination, [function](Warp& warp, const Instruction& instruction, Lanes lanes) {
            compute<Result, Sources...>(warp, instruction, lanes, function, std::index_sequence_for<Sources...>());
            return Outcome::kNext;
          }};
}

// The same of one or two numbers whose halves are the result's: `halves(a, b)` says which of them are unknown.
template <typename Result, typename... Sources, typename Function, typename Halves>
Operation in_halves(Function function, Halves halves) {
  return {Form::kDestination, [function, halves](Warp& warp, const Instruction& instruction, Lanes lanes) {
            const Unknown unknown = halves(warp.unknown(instruction.sources[0]), warp.unknown(instruction.sources.back()));
            compute<Result, Sources...>(warp, instruction, lanes, function, std::index_sequence_for<Sources...>());
            warp.set_unknown(instruction.destinations[0], lanes, unknown);
            return Outcome::kNext;
          }};
}

}  // namespace ptx
