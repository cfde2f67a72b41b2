// Loads, stores and asynchronous copies: addresses from registers, and every access checked.
#include "instructions.h"

namespace ptx {

namespace {

std::uint64_t address(Warp& warp, const Instruction& instruction, int which, int lane) {
  return warp.values(instruction.sources[which])[lane] + instruction.offsets[which];
}

std::uint32_t shared_address(Warp& warp, const Instruction& instruction, int which, int lane) {
  return static_cast<std::uint32_t>(address(warp, instruction, which, lane));
}

// The kernel's arguments, which lie in memory of their own.
template <typename T>
Outcome load_parameter(Warp& warp, const Instruction& instruction, Lanes lanes) {
  const std::vector<unsigned char>& parameters = warp.block().parameters;
  warp.require_known(instruction, instruction.sources[0], lanes, "is an address");
  for_each(lanes, [&](int lane) {
    for (std::size_t k = 0; k < instruction.destinations.size(); ++k) {
      const std::uint64_t at = address(warp, instruction, 0, lane) + k * sizeof(T);
      if (at % sizeof(T) != 0 || at + sizeof(T) > parameters.size()) throw std::domain_error("a read past the kernel's arguments");
      T value;
      std::memcpy(&value, parameters.data() + at, sizeof(T));
      warp.values(instruction.destinations[k])[lane] = bits_of(value);
    }
  });
  for (const int to : instruction.destinations) warp.set_known(to, lanes);
  return Outcome::kNext;
}

template <typename T, bool read_only>
Outcome load_global(Warp& warp, const Instruction& instruction, Lanes lanes) {
  const std::size_t count = instruction.destinations.size();
  warp.require_known(instruction, instruction.sources[0], lanes, "is an address");
  const Visit visit = warp.visit(instruction);
  for_each(lanes, [&](int lane) {
    const std::uint64_t from = address(warp, instruction, 0, lane);
    warp.block().global.check_read(visit, from, count * sizeof(T), read_only);
    std::array<T, 4> values;
    std::memcpy(values.data(), reinterpret_cast<const void*>(from), count * sizeof(T));
    for (std::size_t k = 0; k < count; ++k) warp.values(instruction.destinations[k])[lane] = bits_of(values[k]);
  });
  for (const int to : instruction.destinations) warp.set_known(to, lanes);
  return Outcome::kNext;
}

template <typename T>
Outcome store_global(Warp& warp, const Instruction& instruction, Lanes lanes) {
  const std::size_t count = instruction.sources.size() - 1;
  warp.require_known(instruction, instruction.sources[0], lanes, "is an address");
  for (std::size_t k = 1; k <= count; ++k) warp.require_known(instruction, instruction.sources[k], lanes, "goes to global memory");
  const Visit visit = warp.visit(instruction);
  for_each(lanes, [&](int lane) {
    const std::uint64_t to = address(warp, instruction, 0, lane);
    std::array<T, 4> values;
    for (std::size_t k = 0; k < count; ++k) values[k] = number_of<T>(warp.values(instruction.sources[k + 1])[lane]);
    warp.block().global.check_write(visit, to, count * sizeof(T), values.data());
    std::memcpy(reinterpret_cast<void*>(to), values.data(), count * sizeof(T));
  });
  return Outcome::kNext;
}

Outcome load_shared(Warp& warp, const Instruction& instruction, Lanes lanes) {
  const std::size_t count = instruction.destinations.size();
  warp.require_known(instruction, instruction.sources[0], lanes, "is an address");
  SharedMemory& shared = warp.block().shared;
  std::array<Unknown, 4> unknown;
  unknown.fill({0, 0});
  for_each(lanes, [&](int lane) {
    const Access access = warp.access(instruction, lane);
    const std::uint32_t from = shared_address(warp, instruction, 0, lane);
    shared.check(access, from, 4 * count);
    for (std::size_t k = 0; k < count; ++k) {
      const SharedMemory::Value value = shared.read(access, from + 4 * k, Lanes{1} << lane);
      warp.values(instruction.destinations[k])[lane] = value.bits;
      unknown[k].low |= Lanes{value.low_unknown} << lane, unknown[k].high |= Lanes{value.high_unknown} << lane;
    }
  });
  for (std::size_t k = 0; k < count; ++k) warp.set_unknown(instruction.destinations[k], lanes, unknown[k]);
  return Outcome::kNext;
}

Outcome store_shared(Warp& warp, const Instruction& instruction, Lanes lanes) {
  const std::size_t count = instruction.sources.size() - 1;
  warp.require_known(instruction, instruction.sources[0], lanes, "is an address");
  SharedMemory& shared = warp.block().shared;
  for_each(lanes, [&](int lane) {
    const Access access = warp.access(instruction, lane);
    const std::uint32_t to = shared_address(warp, instruction, 0, lane);
    shared.check(access, to, 4 * count);
    for (std::size_t k = 0; k < count; ++k) {
      const int from = instruction.sources[k + 1];
      const Unknown& unknown = warp.unknown(from);
      shared.write(access, to + 4 * k,
                   {static_cast<std::uint32_t>(warp.values(from)[lane]), (unknown.low >> lane & 1) != 0, (unknown.high >> lane & 1) != 0});
    }
  });
  return Outcome::kNext;
}

Outcome copy(Warp& warp, const Instruction& instruction, Lanes lanes) {
  for (int which = 0; which < 2; ++which) warp.require_known(instruction, instruction.sources[which], lanes, "is an address");
  const int bytes = static_cast<int>(warp.values(instruction.sources[2])[0]);
  for_each(lanes, [&](int lane) {
    warp.start_copy(instruction, lane, shared_address(warp, instruction, 0, lane), address(warp, instruction, 1, lane), bytes);
  });
  return Outcome::kNext;
}

template <typename T>
void add_type(Table& table, const std::string& type) {
  for (const char* vector : {"", ".v2", ".v4"}) {
    const std::string end = vector + ("." + type);
    table["ld.param" + end] = {Form::kLoad, load_parameter<T>};
    table["ld.global" + end] = {Form::kLoad, load_global<T, false>};
    table["ld.global.nc" + end] = {Form::kLoad, load_global<T, true>};
    table["st.global" + end] = {Form::kStore, store_global<T>};
    if (sizeof(T) == 4) table["ld.shared" + end] = {Form::kLoad, load_shared}, table["st.shared" + end] = {Form::kStore, store_shared};
  }
}

}  // namespace

void add_memory(Table& table) {
  add_type<std::uint8_t>(table, "u8");
  add_type<std::uint16_t>(table, "u16");
  for (const char* type : {"u32", "b32", "f32"}) add_type<std::uint32_t>(table, type);
  for (const char* type : {"u64", "f64"}) add_type<std::uint64_t>(table, type);
  table["cp.async.cg.shared.global"] = table["cp.async.ca.shared.global"] = {Form::kCopy, copy};
  table["cp.async.commit_group"] = {Form::kNone, [](Warp& warp, const Instruction&, Lanes lanes) {
                                      for_each(lanes, [&](int lane) { warp.commit_copies(lane); });
                                      return Outcome::kNext;
                                    }};
  table["cp.async.wait_group"] = {Form::kSources, [](Warp& warp, const Instruction& instruction, Lanes lanes) {
                                    const auto pending = static_cast<unsigned>(warp.values(instruction.sources[0])[0]);
                                    for_each(lanes, [&](int lane) { warp.wait_for_copies(lane, pending); });
                                    return Outcome::kNext;
                                  }};
}

}  // namespace ptx
