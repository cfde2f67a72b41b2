// The three loops that do nearly all the arithmetic, over rows of D numbers padded with zeros to `stride`, a multiple of kColumns:
//
//   dots    z[r][e]   = sum_d rows[r][d] M[e][d]        logits u W^T, and a = d V^T
//   mix     out[r][d] = sum_e c[r][e] M[e][d]           g V, and dz W
//   outer   acc[e][d] += sum_r c[r][e] rows[r][d]       dW = dz^T u, and dV = (s g)^T d, a block of columns at a time
//
// M and acc (E, D) lie in blocks of kColumns columns, all experts of a block together (`blocked`), so that every loop walks through
// memory in order: with whole rows, widths like 1024 put all experts into the same few cache sets. The tiles are shaped to be bound by
// FMAs, not by loads: a register of M serves R rows. `mix_block` and `outer_block` do one block of columns.
#pragma once

#include <type_traits>

#include "vector.h"

namespace steer::cpu::STEER_NAMESPACE {

constexpr int kRegisters = 4;  // registers a block is wide

template <typename C>
constexpr int kColumns = kRegisters * Vector<C>::kLanes;

// Element (e, d) of a blocked matrix.
template <typename C>
inline std::int64_t blocked(std::int64_t e, std::int64_t d, std::int64_t experts) {
  return (d / kColumns<C> * experts + e) * kColumns<C> + d % kColumns<C>;
}

// Prefetches K registers of a row.
template <typename C, int K, typename S>
[[gnu::always_inline]] inline void prefetch_registers(const S* row) {
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) prefetch(row + k * Vector<C>::kLanes);
}

// Always in the order of `sum_four`: experts whose rows are equal have equal logits then, whichever tile they are in, and tie.
template <typename C, int X>
inline void sum_experts(const Vector<C>* sums, C* z) {
  if constexpr (X == 4) {
    sum_four(sums, z);
  } else {
    Vector<C> four[4];
    C totals[4];
    for (int e = 0; e < 4; ++e) four[e] = e < X ? sums[e] : Vector<C>::zero();
    sum_four(four, totals);
    for (int e = 0; e < X; ++e) z[e] = totals[e];
  }
}

// Columns from .. to of rows that end at `stride`. `sums` keeps what has been added up so far, R registers an expert; for whole rows there
// is nothing to keep.
template <typename C>
struct Columns {
  std::int64_t from, to, stride;
  C* sums;

  static Columns all(std::int64_t stride) { return {0, stride, stride, nullptr}; }
  C* sums_of(std::int64_t e, int rows) const { return sums + e * rows * Vector<C>::kLanes; }
};

template <typename C, int R, int X>
[[gnu::always_inline]] inline void take_up(const Columns<C>& columns, std::int64_t e, Vector<C> (&sums)[R][X]) {
  const C* kept = columns.from == 0 ? nullptr : columns.sums_of(e, R);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int x = 0; x < X; ++x) sums[r][x] = kept == nullptr ? Vector<C>::zero() : Vector<C>::load(kept + (r * X + x) * Vector<C>::kLanes);
}

// z: (R, experts), complete with the rows' last column.
template <typename C, int R, int X>
[[gnu::always_inline]] inline void put_down(const Columns<C>& columns, std::int64_t e, const Vector<C> (&sums)[R][X], std::int64_t experts,
                                            C* z) {
  if (columns.to == columns.stride) {
    for (int r = 0; r < R; ++r) sum_experts<C, X>(sums[r], z + r * experts + e);
    return;
  }
  C* kept = columns.sums_of(e, R);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int x = 0; x < X; ++x) sums[r][x].store(kept + (r * X + x) * Vector<C>::kLanes);
}

// A register tile of R rows and X experts, from `e` on: R * X accumulators. `meanwhile(d)` is called once for every register of columns.
template <typename C, int R, int X, typename U, typename Meanwhile>
[[gnu::always_inline]] inline void dots_tile(const U* const* rows, const C* M, std::int64_t experts, std::int64_t e,
                                             const Columns<C>& columns, C* z, Meanwhile meanwhile) {
  using V = Vector<C>;
  V sums[R][X];
  take_up(columns, e, sums);
  M += columns.from * experts + e * kColumns<C>;
  for (std::int64_t d = columns.from; d < columns.to; d += kColumns<C>, M += experts * kColumns<C>)
    for (int k = 0; k < kColumns<C>; k += V::kLanes) {
      meanwhile(d + k);
      V u[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) u[r] = V::load(rows[r] + d + k);
#pragma GCC unroll 8
      for (int x = 0; x < X; ++x) {
        const V m = V::load(M + x * kColumns<C> + k).kept();
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[r][x] = fma(u[r], m, sums[r][x]);
      }
    }
  put_down(columns, e, sums, experts, z);
}

// `columns` are whole blocks. `meanwhile(tile)` gives what a tile calls.
template <typename C, int R, typename U, typename Meanwhile>
[[gnu::always_inline]] inline void dots(const U* const* rows, const C* M, std::int64_t experts, const Columns<C>& columns, C* z,
                                        Meanwhile meanwhile) {
  constexpr int X = Vector<C>::kExperts;
  std::int64_t e = 0;
  for (; e + X <= experts; e += X) dots_tile<C, R, X>(rows, M, experts, e, columns, z, meanwhile(e / X));
  for (; e + 2 <= experts; e += 2) dots_tile<C, R, 2>(rows, M, experts, e, columns, z, meanwhile(e / X));
  for (; e < experts; ++e) dots_tile<C, R, 1>(rows, M, experts, e, columns, z, meanwhile(e / X));
}

#if defined(__AVX512BF16__)

// The same on pairs of bfloat16 with the processor's own dot product: exact products and float32 sums (subnormal ones are zero), half the
// instructions. `rows` and M are bfloat16; M lies in the same blocks of kColumns<float> columns, and rows are whole blocks.
template <int R, int X, typename Meanwhile>
inline void dots_tile(const BFloat16* const* rows, const BFloat16* M, std::int64_t experts, std::int64_t stride, float* z,
                      Meanwhile meanwhile) {
  constexpr int kPairs = 2 * Vector<float>::kLanes;
  const auto load = [](const BFloat16* p) {
    __m512bh value;
    std::memcpy(&value, p, sizeof(value));
    return value;
  };
  __m512 sums[R][X];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int e = 0; e < X; ++e) sums[r][e] = _mm512_setzero_ps();
  for (std::int64_t d = 0; d < stride; d += kColumns<float>, M += experts * kColumns<float>)
    for (int k = 0; k < kColumns<float>; k += kPairs) {
      meanwhile(d + k);
      __m512bh u[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) u[r] = load(rows[r] + d + k);
#pragma GCC unroll 8
      for (int e = 0; e < X; ++e) {
        const __m512bh m = load(M + e * kColumns<float> + k);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sums[r][e] = _mm512_dpbf16_ps(sums[r][e], u[r], m);
      }
    }
  for (int r = 0; r < R; ++r) {
    Vector<float> row[X];
#pragma GCC unroll 8
    for (int e = 0; e < X; ++e) row[e].v = sums[r][e];
    sum_experts<float, X>(row, z + r * experts);
  }
}

template <int R, typename Meanwhile>
void dots(const BFloat16* const* rows, const BFloat16* M, std::int64_t experts, std::int64_t stride, float* z, Meanwhile meanwhile) {
  constexpr int X = Vector<float>::kExperts;
  std::int64_t e = 0;
  for (; e + X <= experts; e += X) dots_tile<R, X>(rows, M + e * kColumns<float>, experts, stride, z + e, meanwhile(e / X));
  for (; e < experts; ++e) dots_tile<R, 1>(rows, M + e * kColumns<float>, experts, stride, z + e, meanwhile(e / X));
}

#endif

template <typename C, int R, bool whole, typename Emit>
[[gnu::always_inline]] inline void mix_block(const C* c, const C* M, std::int64_t experts, std::int64_t d, Emit& emit) {
  using V = Vector<C>;
  constexpr int K = kRegisters;
  V sums[R][K];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) sums[r][k] = V::zero();
  for (std::int64_t e = 0; e < experts; ++e, M += kColumns<C>) {
    V m[K];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) m[k] = V::load(M + k * V::kLanes).kept();
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V weight = V::set(c[r * experts + e]);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) sums[r][k] = fma(weight, m[k], sums[r][k]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) emit(std::bool_constant<whole>(), r, d, sums[r]);
}

// `emit(whole, r, d, values)` takes a block of row r, kRegisters of them, from column d on. `whole` (a constant) tells that all of it lies
// within the row's `width` columns; the block that does not is kept out of the loop, since the calls it makes would push the sums to the
// stack.
template <typename C, int R, typename Emit>
inline void mix(const C* c, const C* M, std::int64_t experts, std::int64_t width, Emit&& emit) {
  std::int64_t d = 0;
  for (; d + kColumns<C> <= width; d += kColumns<C>, M += experts * kColumns<C>) mix_block<C, R, true>(c, M, experts, d, emit);
  if (d < width) mix_block<C, R, false>(c, M, experts, d, emit);
}

// acc[e][d ..] += sum_r c[r][e] row(K, r, d)[..] over `rows` rows: X experts and K registers of a block of columns, from column `d` of it
// on. `row(K, r, d)` points there in row r, and may ask for others meanwhile. The rows' sum is added up from zero, so that a chain of
// additions is no longer than that.
template <typename C, int X, int K, typename Row>
[[gnu::always_inline]] inline void outer_tile(Row& row, std::int64_t rows, const C* c, std::int64_t experts, std::int64_t d, C* acc) {
  using V = Vector<C>;
  V sums[X][K];
#pragma GCC unroll 8
  for (int e = 0; e < X; ++e)
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) sums[e][k] = V::zero();
  for (std::int64_t r = 0; r < rows; ++r, c += experts) {
    const auto* const u = row(std::integral_constant<int, K>(), r, d);
    V part[K];
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) part[k] = V::load(u + k * V::kLanes).kept();
#pragma GCC unroll 8
    for (int e = 0; e < X; ++e) {
      const V weight = V::set(c[e]);
#pragma GCC unroll 8
      for (int k = 0; k < K; ++k) sums[e][k] = fma(weight, part[k], sums[e][k]);
    }
  }
#pragma GCC unroll 8
  for (int e = 0; e < X; ++e)
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k) {
      C* out = acc + e * kColumns<C> + d + k * V::kLanes;
      (V::load(out) + sums[e][k]).store(out);
    }
}

// Tiles of X experts and K registers, from expert `e` on, as many as there are; returns the first expert that is left.
template <typename C, int X, int K, typename Row>
[[gnu::always_inline]] inline std::int64_t outer_tiles(Row& row, std::int64_t rows, const C* c, std::int64_t e, std::int64_t experts,
                                                       C* acc) {
  for (; e + X <= experts; e += X)
#pragma GCC unroll 8
    for (int k = 0; k < kRegisters; k += K) outer_tile<C, X, K>(row, rows, c + e, experts, k * Vector<C>::kLanes, acc + e * kColumns<C>);
  return e;
}

// Many experts at once where there are as many: a row is read, and prefetched, once for all of them.
template <typename C, typename Row>
inline void outer_block(Row&& row, std::int64_t rows, const C* c, std::int64_t experts, C* acc) {
  using V = Vector<C>;
  std::int64_t e = outer_tiles<C, V::kOuter, V::kOuterRegisters>(row, rows, c, 0, experts, acc);
  if constexpr (V::kOuter > 4) e = outer_tiles<C, 4, kRegisters>(row, rows, c, e, experts, acc);
  outer_tiles<C, 1, kRegisters>(row, rows, c, e, experts, acc);
}

}  // namespace steer::cpu::STEER_NAMESPACE
