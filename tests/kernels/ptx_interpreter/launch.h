// A launch: block after block, and of a block warp after warp, each as far as its next barrier, in an order that the tests choose.
#pragma once

#include "warp.h"

namespace ptx {

enum class Order : int { kAscending = 0, kDescending = 1, kRandom = 2 };
void set_order(Order order, unsigned seed);

// Runs all of the grid. `parameters`: the kernel's arguments, as they lie in its memory for them.
void run(const Kernel& kernel, Grid grid, int threads, std::size_t shared_bytes, const std::vector<unsigned char>& parameters,
         std::vector<Region> regions);

}  // namespace ptx
