// A GPU for tests: runs a kernel's threads on the host, one after the other, block by block.
//
// Every thread is a fiber with a stack of its own. It runs until it has to wait for others, at a barrier, a shuffle or a product of the
// tensor cores, and then the next one runs: in ascending or descending order, or in one drawn at random, so that a barrier that is missing
// shows as a wrong result. Threads that wait for each other at different places are found out, not waited for. Shared memory starts as NaN,
// asynchronous copies land as late as they may, and the tensor cores round as real ones do: products exact, sums cut off.
#pragma once

#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#define STEER_KERNEL void
#define STEER_THREADS(threads, blocks)
#define STEER_DEVICE inline
#define STEER_BOTH inline

namespace steer::cuda {

namespace emulator {

enum class Order : int { kAscending = 0, kDescending = 1, kRandom = 2 };

// A warp's meeting point: lanes leave what they bring and take what the others brought, in turns of two sets of slots.
struct Exchange {
  std::uint64_t slots[2][32][8];
  float results[2][32][4];
  const void* kind = nullptr;
  int arrived = 0;
  std::uint64_t generation = 0;
};

struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Thread {
  int index;
  std::vector<std::vector<Copy>> groups;  // committed, the oldest first
  std::vector<Copy> open;
};

Thread& current();
int block(int axis);
int grid(int axis);
char* shared();
void check_shared(const void* address, std::size_t bytes);
void wait_at_block_barrier();
// Waits until the warp's 32 lanes have come; `kind` tells what they came for. The last one to come runs `complete`. Returns the turn.
int meet(const void* kind, const std::uint64_t* brought, int count, void (*complete)(Exchange&, int turn));
Exchange& exchange();

// Runs `body` as every thread of every block. Throws std::runtime_error if threads wait for what cannot come.
void run(const std::function<void()>& body, const std::int64_t (&grid_size)[3], int threads, std::int64_t shared_bytes);

float cut_sum(const double* products, int count, float start);

}  // namespace emulator

inline int thread_index() { return emulator::current().index; }
inline int block_index() { return emulator::block(0); }
inline int block_index_y() { return emulator::block(1); }
inline int block_index_z() { return emulator::block(2); }
inline int grid_size() { return emulator::grid(0); }
inline int grid_size_y() { return emulator::grid(1); }
inline char* shared_memory() { return emulator::shared(); }
inline void sync_block() { emulator::wait_at_block_barrier(); }

inline std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float float_of(std::uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline void sync_warp() {
  static const char kind = 0;
  emulator::meet(&kind, nullptr, 0, nullptr);
}
inline float shuffle_xor(float value, int mask) {
  static const char kind = 0;
  const std::uint64_t brought[] = {bits_of(value), static_cast<std::uint64_t>(mask)};
  const int turn = emulator::meet(&kind, brought, 2, nullptr), from = (thread_index() % 32) ^ mask;
  return float_of(static_cast<std::uint32_t>(emulator::exchange().slots[turn][from][0]));
}

inline float exponential(float value) { return std::exp(value); }
inline float square_root(float value) { return std::sqrt(value); }
inline float multiply_add(float a, float b, float c) { return std::fmaf(a, b, c); }

inline std::uint32_t low_halves(std::uint32_t a, std::uint32_t b) { return (a & 0xffffu) | b << 16; }
inline std::uint32_t high_halves(std::uint32_t a, std::uint32_t b) { return a >> 16 | (b & 0xffff0000u); }

inline float widen(float value) { return value; }
inline float widen(BFloat16 value) { return float_of(static_cast<std::uint32_t>(value.bits) << 16); }
inline float widen(Half value) {
  _Float16 half;
  std::memcpy(&half, &value.bits, 2);
  return static_cast<float>(half);
}

template <typename T>
inline T narrow(float value);
template <>
inline float narrow<float>(float value) {
  return value;
}
template <>
inline Half narrow<Half>(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  Half result;
  std::memcpy(&result.bits, &half, 2);
  return result;
}
template <>
inline BFloat16 narrow<BFloat16>(float value) {
  if (value != value) return {0x7fff};
  const std::uint32_t bits = bits_of(value);
  return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <typename T>
inline std::uint32_t narrow_pair(float low, float high) {
  return narrow<T>(low).bits | static_cast<std::uint32_t>(narrow<T>(high).bits) << 16;
}

inline void check_alignment(const void* address) {
  if (reinterpret_cast<std::uintptr_t>(address) % 16 != 0)
    throw std::runtime_error("an access of 16 bytes to an address that is not aligned");
}
inline Words read_only(const Words* address) {
  check_alignment(address);
  return *address;
}
inline Words read_shared(const Words* address) {
  check_alignment(address);
  emulator::check_shared(address, sizeof(Words));
  return *address;
}
inline void write(Words* address, const Words& value) {
  check_alignment(address);
  *address = value;
}

inline void write_shared(Words* address, const Words& value) {
  emulator::check_shared(address, sizeof(Words));
  write(address, value);
}
inline void check_pair(const float* address) {
  if (reinterpret_cast<std::uintptr_t>(address) % sizeof(Pair) != 0) throw std::runtime_error("a pair at an address that is not aligned");
  emulator::check_shared(address, sizeof(Pair));
}
inline Pair read_pair(const float* address) {
  check_pair(address);
  return {address[0], address[1]};
}
inline void write_pair(float* address, const Pair& value) {
  check_pair(address);
  address[0] = value.first, address[1] = value.second;
}

inline void copy_async(void* shared, const void* global) {
  check_alignment(shared);
  check_alignment(global);
  emulator::check_shared(shared, 16);
  emulator::current().open.push_back({shared, global, 16});
}
inline void copy_word_async(void* shared, const void* global) {
  emulator::check_shared(shared, 4);
  emulator::current().open.push_back({shared, global, 4});
}
inline void commit_copies() {
  emulator::Thread& thread = emulator::current();
  thread.groups.push_back(std::move(thread.open));
  thread.open.clear();
}
template <int Pending>
inline void wait_for_copies() {
  std::vector<std::vector<emulator::Copy>>& groups = emulator::current().groups;
  while (groups.size() > static_cast<std::size_t>(Pending)) {
    for (const emulator::Copy& copy : groups.front()) std::memcpy(copy.to, copy.from, copy.bytes);
    groups.erase(groups.begin());
  }
}

namespace emulator {

template <typename T>
inline double element(std::uint64_t word, int half) {
  return static_cast<double>(widen(T{static_cast<std::uint16_t>(half == 0 ? word & 0xffffu : word >> 16 & 0xffffu)}));
}

// Slots: a (K / 4 words), b (K / 8 words), c (two floats a slot), as one lane holds them.
template <typename T, int K>
inline void multiply(Exchange& exchange, int turn) {
  constexpr int kA = K / 4, kB = K / 8;
  double a[16][K], b[K][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int i = lane / 4, q = lane % 4;
    const std::uint64_t* held = exchange.slots[turn][lane];
    for (int half = 0; half < 2; ++half) {
      for (int w = 0; w < kA; ++w) a[i + 8 * (w % 2)][2 * q + half + 8 * (w / 2)] = element<T>(held[w], half);
      for (int w = 0; w < kB; ++w) b[2 * q + half + 8 * w][i] = element<T>(held[kA + w], half);
    }
  }
  for (int lane = 0; lane < 32; ++lane)
    for (int c = 0; c < 4; ++c) {
      const int row = lane / 4 + 8 * (c / 2), column = lane % 4 * 2 + c % 2;
      double products[K];
      for (int k = 0; k < K; ++k) products[k] = a[row][k] * b[k][column];
      const std::uint64_t start = exchange.slots[turn][lane][kA + kB + c / 2] >> 32 * (c % 2);
      exchange.results[turn][lane][c] = cut_sum(products, K, float_of(static_cast<std::uint32_t>(start)));
    }
}

template <typename T, int K>
inline void multiply_on_warp(float (&c)[4], std::initializer_list<std::uint32_t> operands) {
  static const char kind = 0;
  std::uint64_t brought[8];
  int count = 0;
  for (const std::uint32_t operand : operands) brought[count++] = operand;
  for (int pair = 0; pair < 2; ++pair) brought[count++] = bits_of(c[2 * pair]) | static_cast<std::uint64_t>(bits_of(c[2 * pair + 1])) << 32;
  const int turn = meet(&kind, brought, count, &multiply<T, K>);
  std::memcpy(c, exchange().results[turn][thread_index() % 32], sizeof(c));
}

}  // namespace emulator

namespace emulator {

// Slots: a row's address. The last lane to come reads for all, as the warp does: at once.
inline void transpose(Exchange& exchange, int turn) {
  for (int lane = 0; lane < 32; ++lane)
    for (int matrix = 0; matrix < 4; ++matrix) {
      std::uint16_t pair[2];
      for (int half = 0; half < 2; ++half) {
        const std::uint64_t row = exchange.slots[turn][8 * matrix + 2 * (lane % 4) + half][0];
        std::memcpy(&pair[half], reinterpret_cast<const std::uint16_t*>(row) + lane / 4, 2);
      }
      std::memcpy(&exchange.results[turn][lane][matrix], pair, 4);
    }
}

}  // namespace emulator

inline Words read_transposed(const void* shared) {
  static const char kind = 0;
  check_alignment(shared);
  emulator::check_shared(shared, 16);
  const std::uint64_t brought[] = {reinterpret_cast<std::uint64_t>(shared)};
  const int turn = emulator::meet(&kind, brought, 1, &emulator::transpose);
  Words words;
  std::memcpy(words.at, emulator::exchange().results[turn][thread_index() % 32], sizeof(words));
  return words;
}

template <typename T>
inline void mma(float (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2, std::uint32_t a3, std::uint32_t b0, std::uint32_t b1) {
  emulator::multiply_on_warp<T, 16>(c, {a0, a1, a2, a3, b0, b1});
}
inline void mma_k8(float (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t b0) {
  emulator::multiply_on_warp<BFloat16, 8>(c, {a0, a1, b0});
}

}  // namespace steer::cuda
