#include "launch.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>

namespace ptx {

namespace {

Order order = Order::kAscending;
std::mt19937 randomness;

std::vector<std::uint32_t> in_order(std::uint32_t count) {
  std::vector<std::uint32_t> turns(count);
  std::iota(turns.begin(), turns.end(), 0u);
  if (order == Order::kDescending) std::reverse(turns.begin(), turns.end());
  if (order == Order::kRandom) std::shuffle(turns.begin(), turns.end(), randomness);
  return turns;
}

void run_block(Block& block, std::vector<std::unique_ptr<Warp>>& warps) {
  block.shared.start_block();
  for (const auto& warp : warps) warp->start();
  for (;;) {
    for (const std::uint32_t turn : in_order(block.warps)) warps[turn]->run();
    const auto ended = std::count_if(warps.begin(), warps.end(), [](const auto& warp) { return warp->ended(); });
    if (ended == block.warps) return;
    if (ended > 0) throw Fault("warps wait at a barrier that others have ended without: " + block.kernel.name);
    block.shared.pass_barrier();
    ++block.turn;
    for (const auto& warp : warps) warp->sync();
  }
}

}  // namespace

void set_order(Order value, unsigned seed) {
  order = value;
  randomness.seed(seed);
}

void run(const Kernel& kernel, Grid grid, int threads, std::size_t shared_bytes, const std::vector<unsigned char>& parameters,
         std::vector<Region> regions) {
  SharedMemory shared(kernel, shared_bytes);
  GlobalMemory global(kernel, std::move(regions));
  Block block{kernel, parameters, grid, threads / kWarpSize, shared, global};
  std::vector<std::unique_ptr<Warp>> warps;
  for (int index = 0; index < block.warps; ++index) warps.push_back(std::make_unique<Warp>(block, index));
  for (const std::uint32_t index : in_order(grid.size())) {
    block.index = index;
    ++block.turn;
    run_block(block, warps);
  }
}

}  // namespace ptx
