// A kernel as nvcc wrote it down in PTX, decoded once.
//
// An operand is always the number of a register: numbers that stand in the text, and what a thread knows about itself, lie in registers of
// their own, which are filled before the first instruction. A predicate is a register of zeros and ones.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace ptx {

constexpr int kWarpSize = 32;
using Lanes = std::uint32_t;  // one bit for each of a warp's threads
constexpr Lanes kAllLanes = ~Lanes{0};

// What a kernel must not do, with the line of the sources that does it; or what the interpreter does not know.
struct Fault : std::runtime_error {
  using runtime_error::runtime_error;
};

class Warp;
struct Instruction;

enum class Outcome {
  kNext,
  kJump,
  kWaitForLanes,    // it takes all of the warp's lanes, and some are elsewhere
  kWaitForBarrier,  // and goes on behind it
  kExit,
};
using Execute = std::function<Outcome(Warp&, const Instruction&, Lanes)>;

// How an instruction's operands are written.
enum class Form {
  kNone,         // commit
  kSources,      // wait 1
  kDestination,  // add d, a, b
  kLoad,         // ld d, [a + 4]
  kStore,        // st [a + 4], b
  kCopy,         // cp [a + 4], [b + 4], 16
  kBranch,       // bra label
};

struct Operation {
  Form form;
  Execute execute;
};

// All instructions that are known, by their names; any other is a Fault.
const std::map<std::string, Operation>& operations();

struct Instruction {
  const Operation* operation = nullptr;
  std::string text;
  std::vector<int> destinations, sources;
  std::array<std::int64_t, 2> offsets{};  // added to the addresses
  int guard = -1;                         // a predicate, or none
  bool guard_negated = false;
  int target = -1;  // of a branch
  int line = 0;     // in the PTX
  std::string source;
};

struct Parameter {
  std::string name;
  std::size_t offset = 0, size = 0;
};

// What a thread can ask about itself.
enum class Special { kThread, kBlockX, kBlockY, kBlockZ, kBlocksX, kBlocksY, kBlocksZ };

struct Kernel {
  std::string name;
  std::vector<Parameter> parameters;
  std::size_t parameter_bytes = 0;
  int blocks_per_multiprocessor = 1;
  std::vector<Instruction> instructions;
  int registers = 0;
  std::vector<std::pair<int, std::uint64_t>> constants;
  std::vector<std::pair<int, Special>> specials;

  // The instruction's place, for messages.
  std::string place(const Instruction& instruction) const;
};

// Reads a file of PTX; its kernels are found by their mangled names from then on, in the place of others of the same names.
void load(const std::string& path);
const Kernel& find(const std::string& name);
// What of all that was loaded is not understood: empty, or the first such thing. Another nvcc may write what this one does not.
std::string not_understood();

}  // namespace ptx
