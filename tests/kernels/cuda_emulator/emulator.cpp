#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <utility>

#include "device.h"
#include "launch.h"

namespace steer::cuda::emulator {

namespace {

constexpr std::size_t kStack = 256 * 1024;

struct Fiber {
  Thread thread;
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  std::jmp_buf here;
  bool begun = false, done = false;
  // Waits while the counter still shows this value.
  const std::uint64_t* counter = nullptr;
  std::uint64_t value = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Exchange> warps;
  std::vector<char> memory;
  int arrived = 0, threads = 0;
  std::uint64_t barriers = 0;
  Fiber* running = nullptr;
  std::jmp_buf scheduler;
  std::exception_ptr failure;
  const std::function<void()>* body = nullptr;
  std::int64_t index[3] = {}, grid[3] = {};
};

Block state;
Order order = Order::kAscending;
std::mt19937 randomness{0};

void enter() {
  Fiber& fiber = *state.running;
  try {
    (*state.body)();
  } catch (...) {
    if (!state.failure) state.failure = std::current_exception();
  }
  fiber.done = true;
  _longjmp(state.scheduler, 1);
}

void resume(Fiber& fiber) {
  state.running = &fiber;
  if (_setjmp(state.scheduler) != 0) return;
  if (fiber.begun) _longjmp(fiber.here, 1);
  fiber.begun = true;
  setcontext(&fiber.start);
}

void wait_for(const std::uint64_t& counter, std::uint64_t value) {
  Fiber& fiber = *state.running;
  fiber.counter = &counter;
  fiber.value = value;
  if (_setjmp(fiber.here) == 0) _longjmp(state.scheduler, 1);
  fiber.counter = nullptr;
}

void run_block() {
  state.arrived = 0;
  state.failure = nullptr;
  for (Exchange& warp : state.warps) warp.arrived = 0;
  std::memset(state.memory.data(), 0xff, state.memory.size());
  for (Fiber& fiber : state.fibers) {
    fiber.begun = fiber.done = false;
    fiber.counter = nullptr;
    fiber.thread.groups.clear();
    fiber.thread.open.clear();
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.get();
    fiber.start.uc_stack.ss_size = kStack;
    makecontext(&fiber.start, enter, 0);
  }
  std::vector<int> turns(state.threads);
  std::iota(turns.begin(), turns.end(), 0);
  if (order == Order::kDescending) std::reverse(turns.begin(), turns.end());
  for (;;) {
    if (order == Order::kRandom) std::shuffle(turns.begin(), turns.end(), randomness);
    bool moved = false, all_done = true;
    for (const int turn : turns) {
      Fiber& fiber = state.fibers[turn];
      if (!fiber.done && (fiber.counter == nullptr || *fiber.counter != fiber.value)) {
        resume(fiber);
        moved = true;
      }
      all_done &= fiber.done;
      if (state.failure) std::rethrow_exception(state.failure);
    }
    if (all_done) return;
    if (!moved) throw std::runtime_error("threads of a block wait for what the others never reach");
  }
}

}  // namespace

Thread& current() { return state.running->thread; }
int block(int axis) { return static_cast<int>(state.index[axis]); }
int grid(int axis) { return static_cast<int>(state.grid[axis]); }
char* shared() { return state.memory.data(); }
Exchange& exchange() { return state.warps[current().index / 32]; }

void check_shared(const void* address, std::size_t bytes) {
  const char* at = static_cast<const char*>(address);
  if (at < state.memory.data() || at + bytes > state.memory.data() + state.memory.size())
    throw std::runtime_error("an access past the block's shared memory");
}

void wait_at_block_barrier() {
  for (const Exchange& warp : state.warps)
    if (warp.arrived != 0 && &warp == &exchange()) throw std::runtime_error("a barrier of the block in the middle of a warp's exchange");
  const std::uint64_t value = state.barriers;
  if (++state.arrived < state.threads) return wait_for(state.barriers, value);
  state.arrived = 0;
  ++state.barriers;
}

int meet(const void* kind, const std::uint64_t* brought, int count, void (*complete)(Exchange&, int)) {
  Exchange& warp = exchange();
  const std::uint64_t value = warp.generation;
  const int turn = static_cast<int>(value & 1);
  if (warp.arrived > 0 && warp.kind != kind) throw std::runtime_error("lanes of a warp wait for different things");
  warp.kind = kind;
  std::copy(brought, brought + count, warp.slots[turn][current().index % 32]);
  if (++warp.arrived < 32) {
    wait_for(warp.generation, value);
  } else {
    if (complete != nullptr) complete(warp, turn);
    warp.arrived = 0;
    ++warp.generation;
  }
  return turn;
}

void run(const std::function<void()>& body, const std::int64_t (&grid_size)[3], int threads, std::int64_t shared_bytes) {
  state.body = &body;
  state.threads = threads;
  if (static_cast<int>(state.fibers.size()) != threads) {
    state.fibers = std::vector<Fiber>(threads);
    for (int t = 0; t < threads; ++t) {
      state.fibers[t].thread.index = t;
      state.fibers[t].stack.reset(new char[kStack]);
    }
    state.warps.assign(threads / 32, Exchange());
  }
  state.memory = std::vector<char>(shared_bytes);
  std::copy(std::begin(grid_size), std::end(grid_size), state.grid);
  for (std::int64_t z = 0; z < grid_size[2]; ++z)
    for (std::int64_t y = 0; y < grid_size[1]; ++y)
      for (std::int64_t x = 0; x < grid_size[0]; ++x) {
        state.index[0] = x, state.index[1] = y, state.index[2] = z;
        run_block();
      }
}

// A sum as the tensor cores form it: every addend cut off 24 bits below the largest, the exact sum of these cut to float32.
float cut_sum(const double* products, int count, float start) {
  double largest = std::fabs(start), plain = start;
  for (int k = 0; k < count; ++k) {
    largest = std::max(largest, std::fabs(products[k]));
    plain += products[k];
  }
  if (!std::isfinite(plain) || largest == 0.0) return static_cast<float>(plain);
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 24);
  double sum = std::trunc(start / unit);
  for (int k = 0; k < count; ++k) sum += std::trunc(products[k] / unit);
  const double exact = sum * unit;
  const float nearest = static_cast<float>(exact);
  return std::fabs(nearest) > std::fabs(exact) ? std::nextafter(nearest, 0.0f) : nearest;
}

Machine machine{3, 163 * 1024, 164 * 1024};
std::vector<std::string> launched;

}  // namespace steer::cuda::emulator

// The emulator's controls, for Python's ctypes.
extern "C" {

// How the threads of a block take turns: see Order.
void emulator_set_order(int value, unsigned seed) {
  using namespace steer::cuda::emulator;
  order = static_cast<Order>(value);
  randomness.seed(seed);
}

void emulator_set_machine(int multiprocessors, std::int64_t shared_bytes) {
  steer::cuda::emulator::machine = {multiprocessors, shared_bytes, shared_bytes + 1024};
}

// The kernels launched since the last call, one a line, with their numbers of blocks.
const char* emulator_take_launched() {
  using namespace steer::cuda::emulator;
  static std::string lines;
  lines.clear();
  for (const std::string& name : std::exchange(launched, {})) lines += name + "\n";
  return lines.c_str();
}
}

namespace steer::cuda {

std::string architectures() { return "emulated"; }
std::string toolkit() { return "none"; }

}  // namespace steer::cuda
