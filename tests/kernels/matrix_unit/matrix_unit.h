// The processor's matrix unit (AMX) for tests, on processors that have none: its instructions, one thread's registers, in plain loops.
//
// To be included before all else, for a compiler that knows AVX-512 with bfloat16. The kernels then find the unit where CMakeLists.txt
// would have asked for it. As the real one does, it counts subnormal numbers as zero, and starts and ends with registers that hold nothing:
// what uses it without having set it up ends the process.
#pragma once

#include <immintrin.h>

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define __AMX_BF16__ 1
// Forward passes by turns, which only Intel's processors take: here all do.
#define __builtin_cpu_is(vendor) true

namespace matrix_unit {

constexpr int kRows = 16, kBytes = 64, kNumbers = 16;  // a register: rows, bytes of one, numbers of float in them

struct Unit {
  bool ready = false;
  alignas(64) unsigned char tiles[8][kRows][kBytes];
};

inline thread_local Unit unit;
inline std::atomic<std::int64_t> products{0};

inline void expect(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "matrix unit: %s\n", what);
  std::abort();
}

inline void set_up(const void* shape) {
  const auto* bytes = static_cast<const unsigned char*>(shape);
  expect(bytes[0] == 1, "a palette that is not 1");
  for (int i = 0; i < 8; ++i) {
    std::uint16_t row;
    std::memcpy(&row, bytes + 16 + 2 * i, sizeof row);
    expect(row == kBytes && bytes[48 + i] == kRows, "registers that are not whole");
  }
  unit.ready = true;
  std::memset(unit.tiles, 0xff, sizeof unit.tiles);  // the real ones are zero: nobody should rest on it
}

inline void give_up() {
  expect(unit.ready, "given up by who does not have it");
  unit.ready = false;
}

inline void zero(int tile) {
  expect(unit.ready, "not set up");
  std::memset(unit.tiles[tile], 0, sizeof unit.tiles[tile]);
}

inline void load(int tile, const void* from, std::int64_t apart) {
  expect(unit.ready, "not set up");
  for (int r = 0; r < kRows; ++r) std::memcpy(unit.tiles[tile][r], static_cast<const char*>(from) + r * apart, kBytes);
}

inline void store(int tile, void* to, std::int64_t apart) {
  expect(unit.ready, "not set up");
  for (int r = 0; r < kRows; ++r) std::memcpy(static_cast<char*>(to) + r * apart, unit.tiles[tile][r], kBytes);
}

inline float without_subnormals(std::uint32_t bits) {
  if ((bits & 0x7f800000u) == 0) bits &= 0x80000000u;
  float number;
  std::memcpy(&number, &bits, sizeof number);
  return number;
}

inline float widened(const unsigned char* pair, int half) {
  std::uint16_t bits;
  std::memcpy(&bits, pair + 2 * half, sizeof bits);
  return without_subnormals(static_cast<std::uint32_t>(bits) << 16);
}

// sums[m][n] += sum over k of left[m][k] right[k][n], where both are pairs of bfloat16.
inline void multiply(int sums, int left, int right) {
  expect(unit.ready, "not set up");
  ++products;
  float sum[kRows][kNumbers], of_right[2][kRows][kNumbers];
  std::memcpy(sum, unit.tiles[sums], sizeof sum);
  for (int half = 0; half < 2; ++half)
    for (int k = 0; k < kRows; ++k)
      for (int n = 0; n < kNumbers; ++n) of_right[half][k][n] = widened(unit.tiles[right][k] + 4 * n, half);
  for (int m = 0; m < kRows; ++m)
    for (int k = 0; k < kRows; ++k)
      for (int half = 0; half < 2; ++half) {
        const float factor = widened(unit.tiles[left][m] + 4 * k, half);
        for (int n = 0; n < kNumbers; ++n) {
          const float next = sum[m][n] + factor * of_right[half][k][n];
          std::uint32_t bits;
          std::memcpy(&bits, &next, sizeof bits);
          sum[m][n] = without_subnormals(bits);
        }
      }
  std::memcpy(unit.tiles[sums], sum, sizeof sum);
}

}  // namespace matrix_unit

// How many products it has computed since this was asked last.
extern "C" inline __attribute__((used, visibility("default"))) std::int64_t matrix_unit_take_products() {
  return matrix_unit::products.exchange(0);
}

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(shape) matrix_unit::set_up(shape)
#define _tile_release() matrix_unit::give_up()
#define _tile_zero(tile) matrix_unit::zero(tile)
#define _tile_loadd(tile, from, apart) matrix_unit::load(tile, from, apart)
#define _tile_stored(tile, to, apart) matrix_unit::store(tile, to, apart)
#define _tile_dpbf16ps(sums, left, right) matrix_unit::multiply(sums, left, right)
