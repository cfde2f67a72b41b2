// What the backward does once d and dz are known, in one loop for eight experts:
//
//   du = d + dz W      u = y - (s g) V      dW += dz^T u      dV += (s g)^T d
//
// A strip is one register of columns, down all rows of a block. The sums of both outer products stay in registers meanwhile, sixteen of
// them, so that they cost no memory traffic, and every line of the stream is touched once. For that a processor needs thirty-two registers.
//
// Rows are too far apart, and too many, for the prefetchers between L2 and L3, which follow lines in the order of memory; and without them
// a core has only some sixteen lines under way. So every step asks for the next lines of the next block in that order.
#pragma once

#include <cstdint>

#include "primitives.h"

namespace steer::cpu::STEER_NAMESPACE {

constexpr int kStripExperts = 8;
constexpr int kStripRows = 24;  // of a block: with more, their lines do not stay in L2 until they are used

template <typename C>
constexpr bool kStrips = sizeof(Vector<C>) == 64;  // with AVX-512, which has the registers

// A block of rows, `step` numbers apart: d (widened, or as it lies in the stream), y and du, and dz (rows, kStripExperts), with s g
// kStripRows rows after it. One step for all, and few pointers: more do not stay in registers.
template <typename C, typename S, typename D>
struct Rows {
  const D* d;
  const S* y;
  S* du;
  std::int64_t step;
  const C* dz;

  // From `rows` further down, or `columns` further right on.
  [[gnu::always_inline]] Rows down(std::int64_t rows) const {
    return {d + rows * step, y + rows * step, du + rows * step, step, dz + rows * kStripExperts};
  }
  [[gnu::always_inline]] Rows right(std::int64_t columns) const { return {d + columns, y + columns, du + columns, step, dz}; }
};

// What is asked for on the way, a register's numbers for every row: the lines of du, too, which are written later.
template <typename S>
struct Lookahead {
  const S *dy, *y, *du;
};

// R rows of a strip. W and V: its register of every expert, kColumns apart.
template <int R, typename C, typename S, typename D>
[[gnu::always_inline]] inline void strip_rows(const Rows<C, S, D>& rows, const C* W, const C* V, Vector<C>* dW, Vector<C>* dV,
                                              Lookahead<S>& ahead) {
  using Register = Vector<C>;
  Register d[R], du[R], u[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    d[r] = Register::load(rows.d + r * rows.step);
    prefetch(ahead.dy + r * Register::kLanes);
    prefetch(ahead.y + r * Register::kLanes);
    prefetch(ahead.du + r * Register::kLanes);
  }
  ahead.dy += R * Register::kLanes;
  ahead.y += R * Register::kLanes;
  ahead.du += R * Register::kLanes;
#pragma GCC unroll 8
  for (int e = 0; e < kStripExperts; ++e) {
    const Register v = Register::load(V + e * kColumns<C>).kept();
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Register sg = Register::set(rows.dz[(kStripRows + r) * kStripExperts + e]).kept();
      u[r] = e == 0 ? sg * v : fma(sg, v, u[r]);
      dV[e] = fma(sg, d[r], dV[e]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) u[r] = Register::load(rows.y + r * rows.step) - u[r];
#pragma GCC unroll 8
  for (int e = 0; e < kStripExperts; ++e) {
    const Register w = Register::load(W + e * kColumns<C>).kept();
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Register dz = Register::set(rows.dz[r * kStripExperts + e]).kept();
      du[r] = e == 0 ? dz * w : fma(dz, w, du[r]);
      dW[e] = fma(dz, u[r], dW[e]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) (d[r] + du[r]).store(rows.du + r * rows.step);
}

// A strip of `count` rows of the block, from `column` on; dW and dV lie as W and V do. The block comes by reference: a copy for every strip
// is written in pieces and read as a whole, and waits until they have left the store queue, in which they come after the stream's.
template <typename C, typename S, typename D>
[[gnu::noinline]] void strip(const Rows<C, S, D>& block, std::int64_t column, std::int64_t count, const C* W, const C* V, C* dW, C* dV,
                             Lookahead<S>& next) {
  using Register = Vector<C>;
  constexpr int R = 3;
  Register sums_W[kStripExperts], sums_V[kStripExperts];
#pragma GCC unroll 8
  for (int e = 0; e < kStripExperts; ++e) sums_W[e] = sums_V[e] = Register::zero();
  Rows<C, S, D> rows = block.right(column);
  Lookahead<S> ahead = next;
  const C* const end = rows.dz + count * kStripExperts;
  for (const C* const last = end - R * kStripExperts; rows.dz <= last; rows = rows.down(R))
    strip_rows<R>(rows, W, V, sums_W, sums_V, ahead);
  for (; rows.dz < end; rows = rows.down(1)) strip_rows<1>(rows, W, V, sums_W, sums_V, ahead);
  next = ahead;
#pragma GCC unroll 8
  for (int e = 0; e < kStripExperts; ++e) {
    (Register::load(dW + e * kColumns<C>) + sums_W[e]).store(dW + e * kColumns<C>);
    (Register::load(dV + e * kColumns<C>) + sums_V[e]).store(dV + e * kColumns<C>);
  }
}

}  // namespace steer::cpu::STEER_NAMESPACE
