// Launches on the emulated GPU, an sm_80 with few multiprocessors. Every launch is written down with its size.
#pragma once

#include <stdexcept>
#include <string>

namespace steer::cuda {

namespace emulator {

extern Machine machine;
extern std::vector<std::string> launched;  // a kernel's name and its blocks

}  // namespace emulator

inline Machine machine_of(int) { return emulator::machine; }

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

template <typename Kernel>
int resident_blocks(const char*, Kernel, std::int64_t) {
  return 2;
}

template <typename... Parameters>
void launch(const char* name, void (*kernel)(Parameters...), Grid grid, std::int64_t shared, Stream, Parameters... arguments) {
  if (grid.x < 1 || grid.y < 1 || grid.z < 1) throw std::runtime_error(std::string(name) + ": a launch without blocks");
  if (shared > emulator::machine.shared_per_block) throw std::runtime_error(std::string(name) + ": more shared memory than there is");
  emulator::launched.push_back(std::string(name) + " " + std::to_string(grid.x * grid.y * grid.z));
  emulator::run([&] { kernel(arguments...); }, {grid.x, grid.y, grid.z}, kThreads, shared);
}

}  // namespace steer::cuda
