// Backward of a steering pass on the CPU, in one walk over dy, dn and y. Nothing of the forward's interior was kept: the step is undone.
//
//   xhat = (p - mean) rstd       t = dn gamma       p = pool(y)
//   dp = rstd (t - mean(t) - xhat mean(t xhat))     d = dy + unpool(dp)
//   a  = d V^T      ds = sum g a      dg = s a + dg_ext
//   dz = g (dg - sum_e g dg)          du = d + dz W
//   dW = dz^T u     db = sum dz       dV = s g^T d
//
// u = y - s (g V) never leaves L1: it is made where dW reads it. (dW = dz^T y - s (dz^T g) V would be cheaper. In float32 it would be less
// exact as soon as the steering is larger than the stream: a difference of two long sums has few digits left then.)
//
// Each shard sums its own dW, dV, ...; a second pass adds the shards up in order. How the frames are cut into shards depends on the problem
// alone, so results repeat to the bit, whatever the number of threads.
#pragma once

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "memory.h"
#include "operands.h"
#include "parallel.h"
#include "routing.h"
#include "strips.h"
#include "sums.h"

namespace steer::cpu::STEER_NAMESPACE {

template <typename C, typename S>
class BackwardPass {
  using V = Vector<C>;
  static constexpr int kLanes = V::kLanes;

 public:
  // Rows whose outer products are added up before they touch dW and dV: more of them where these do not stay in L2.
  static int block_of(const Backward& call, bool tiled) {
    if (tiled) return kTileRows;
    if (takes_strips(call)) return kStripRows;
    const std::int64_t numbers = 2 * call.problem.experts * stride_of<C>(call.problem);
    return numbers * static_cast<std::int64_t>(sizeof(C)) <= 1 << 20 ? 12 : 24;
  }
  static constexpr int kChain = 192;  // rows that are summed in C

  // In rows of whole blocks; d is a stream, or the scratch rows that the norm's part of it is made in.
  static bool takes_strips(const Backward& call) {
    const Problem& p = call.problem;
    return kStrips<C> && p.experts == kStripExperts && p.width == stride_of<C>(p) && call.du != nullptr && call.dweight != nullptr &&
           call.dvectors != nullptr && (call.dy != nullptr || call.dnormed != nullptr);
  }

  BackwardPass(const Backward& call, const Operands<C>& operands)
      : call_(call), p_(call.problem), operands_(operands), stride_(operands.stride), block_(block_of(call, operands.tiled)) {
    const bool routed = call.du != nullptr || call.dweight != nullptr || call.dbias != nullptr;
    needs_dz_ = routed;
    needs_a_ = routed || call.dscale != nullptr;
    const std::int64_t E = p_.experts, rows = block_ + 4, together = operands.tiled ? kTileRows : V::kRows;
    scratch_.reserve(rows * stride_ + block_ * kColumns<C> + 2 * (block_ + together) * E);
    C* next = scratch_.data();
    const auto take = [&next](std::int64_t count) { return std::exchange(next, next + count); };
    d_ = take(block_ * stride_);
    pooled_ = take(stride_);
    dp_ = take(stride_);
    t_ = take(stride_);
    zero_ = take(stride_);
    std::fill(d_, zero_ + stride_, C(0));
    u_ = take(block_ * kColumns<C>);
    dz_ = take(block_ * E);
    sg_ = take(block_ * E);  // right after dz, where strips look for it
    a_ = take(together * E);
    dg_ = take(together * E);
    if (p_.pool == Pool::kMax) argmax_.resize(p_.width);
    if constexpr (kTiles<S>)
      if (operands.tiled) tiled_.emplace(E, p_.width);
  }

  // Adds the shard's sums to `partial`.
  void run(Shard shard, Partial<C>& partial) {
    partial_ = &partial;
    std::int64_t chain = 0;
    for (std::int64_t row = shard.first; row < shard.last; row += block_) {
      const int count = static_cast<int>(std::min<std::int64_t>(block_, shard.last - row));
      if (chain + count > kChain) {
        partial_->end_chains();
        chain = 0;
      }
      chain += count;
      if constexpr (kTiles<S>)
        if (tiled_) {
          tiled_block(row, count);
          continue;
        }
      block(row, count);
    }
  }

 private:
  // First, a few rows at a time, what needs whole rows: d and dz. Then, a block of columns at a time, what they give: du, u and the outer
  // products, whose sums stay in registers over all the block's rows. The stores of du wait for memory while the others compute.
  void block(std::int64_t first, int count) {
    if constexpr (kWidensInLoops && !std::is_same_v<C, S>)
      if (call_.dnormed == nullptr && call_.dy != nullptr && p_.width == stride_ && p_.experts <= 4 * V::kExperts) {
        const S* dy = static_cast<const S*>(call_.dy) + first * p_.width;
        return block(first, count, [dy, D = p_.width](std::int64_t row) { return dy + row * D; });
      }
    block(first, count, [this](std::int64_t row) { return d_rows_[row]; });
  }

  // `d(row)`: the block's row of d, in the stream dy itself, or (in type C) in d_rows_, which differentiate_rows fills then.
  template <typename Row>
  void block(std::int64_t first, int count, Row d) {
    in_tiles(count, [&](auto rows, std::int64_t r) { differentiate_rows<rows>(first + r, r, d); });
    if constexpr (kStrips<C>)
      if (takes_strips(call_)) return strips(first, count, d(0));
    for (std::int64_t c = 0; c < p_.width; c += kColumns<C>) {
      if (call_.du != nullptr) in_tiles(count, [&](auto rows, std::int64_t r) { gradient_at_u<rows>(first + r, r, c, d); });
      if (call_.dweight != nullptr) add_to_dW(first, count, c);
      if (call_.dvectors != nullptr) add_to_dV(first, count, c, d);
    }
  }

  // The second half for eight experts.
  template <typename Number>
  void strips(std::int64_t first, int count, const Number* d) {
    const std::int64_t D = p_.width;
    const S* y = static_cast<const S*>(call_.y) + first * D;
    const S* incoming = call_.dy == nullptr ? y : static_cast<const S*>(call_.dy) + first * D;
    const Rows<C, S, Number> rows{d, y, static_cast<S*>(call_.du) + first * D, D, dz_};
    Lookahead<S> next{incoming + block_ * D, y + block_ * D, rows.du + block_ * D};
    for (std::int64_t c = 0; c < D; c += kLanes) {
      const std::int64_t at = blocked<C>(0, c, kStripExperts);
      strip(rows, c, count, operands_.W + at, operands_.V + at, partial_->dW.recent() + at, partial_->dV.recent() + at, next);
    }
  }

  // The same as block() on the matrix unit.
  void tiled_block(std::int64_t first, int count) {
    TiledRows& rows = tiled_->rows;
    if (call_.dnormed == nullptr && call_.dy != nullptr) {
      const S* dy = static_cast<const S*>(call_.dy) + first * p_.width;
      tiled_block(first, count, rows.whole(dy, count), nullptr, [dy, D = p_.width](std::int64_t r) { return dy + r * D; });
    } else {
      for (int r = 0; r < count; ++r) rows.cut(d_rows_[r] = gradient_at_y(first + r, d_ + r * stride_), r);
      tiled_block(first, count, rows.hi(), rows.rest(), [this](std::int64_t r) { return d_rows_[r]; });
    }
  }

  template <typename Row>
  void tiled_block(std::int64_t first, int count, const S* hi, const S* rest, Row d) {
    Tiles& unit = tiled_->unit;
    scale_gates(first, 0, count);
    if (needs_a_) {
      unit.dots(hi, rest, count, operands_.dots_tiles, a_, [](std::int64_t) {});
      differentiate_gates(count, first, 0);
    }
    if (needs_dz_) unit.cut(dz_, count, tiled_->dz);
    unit.cut(sg_, count, tiled_->sg);
    for (std::int64_t c = 0; c < p_.width; c += kColumns<C>) {
      const std::int64_t at = blocked<C>(0, c, p_.experts);
      if (call_.du != nullptr) unit.mix_block(tiled_->dz, operands_.W_tiles, c, 0);
      if (call_.dweight != nullptr) unit.mix_block(tiled_->sg, operands_.V_tiles, c, 1);
      if (call_.du != nullptr) unit.emit_block(0, count, c, storing_du(first, d));
      if (call_.dweight != nullptr) {
        unit.emit_block(1, count, c, storing_u(first, 0));
        unit.outer_block(rows_of_u(first, c), count, tiled_->dz, partial_->dW.recent() + at);
      }
      if (call_.dvectors != nullptr) unit.outer_block(rows_of_d(first, c, d), count, tiled_->sg, partial_->dV.recent() + at);
    }
  }

  // work(R, r) for tiles of R rows, a constant, from row r on, until `count` rows are done.
  template <typename Work>
  [[gnu::always_inline]] static void in_tiles(std::int64_t count, Work&& work) {
    std::int64_t r = 0;
    for (; r + V::kRows <= count; r += V::kRows) work(std::integral_constant<int, V::kRows>(), r);
    for (; r < count; ++r) work(std::integral_constant<int, 1>(), r);
  }

  // dW += dz^T u.
  void add_to_dW(std::int64_t first, std::int64_t count, std::int64_t c) {
    in_tiles(count, [&](auto rows, std::int64_t r) { undo<rows>(first + r, r, c); });
    outer_block(rows_of_u(first, c), count, dz_, p_.experts, partial_->dW.recent() + blocked<C>(0, c, p_.experts));
  }

  // dV += (s g)^T d
  template <typename Row>
  void add_to_dV(std::int64_t first, std::int64_t count, std::int64_t c, Row d) {
    outer_block(rows_of_d(first, c, d), count, sg_, p_.experts, partial_->dV.recent() + blocked<C>(0, c, p_.experts));
  }

  // The block's rows for outer_block, from column c on. The next block's are fetched meanwhile.
  auto rows_of_u(std::int64_t first, std::int64_t c) const {
    const S* next = static_cast<const S*>(call_.y) + (first + block_) * p_.width + c;
    return [this, next](auto registers, std::int64_t row, std::int64_t k) {
      prefetch_registers<C, registers>(next + row * p_.width + k);
      return static_cast<const C*>(u_ + row * kColumns<C> + k);
    };
  }
  template <typename Row>
  auto rows_of_d(std::int64_t first, std::int64_t c, Row d) const {
    const S* next = static_cast<const S*>(call_.dy != nullptr ? call_.dy : call_.y) + (first + block_) * p_.width + c;
    return [this, next, c, d](auto registers, std::int64_t row, std::int64_t k) {
      prefetch_registers<C, registers>(next + row * p_.width + k);
      return d(row) + c + k;
    };
  }

  // u = y - (s g) V, a block of columns.
  template <int R>
  void undo(std::int64_t first, std::int64_t at, std::int64_t c) {
    auto store = storing_u(first, at);
    mix_columns<R>(sg_ + at * p_.experts, operands_.V, c, store);
  }

  auto storing_u(std::int64_t first, std::int64_t at) const {
    return [D = p_.width, y = static_cast<const S*>(call_.y) + first * p_.width, u = u_ + at * kColumns<C>](
               auto whole, int r, std::int64_t c, const V* steering) {
      const S* from = y + r * D + c;
      C* to = u + r * kColumns<C>;
#pragma GCC unroll 8
      for (int k = 0; k < kRegisters; ++k)
        (load_up_to<C>(from + k * kLanes, D - c - k * kLanes, whole) - steering[k]).store(to + k * kLanes);
    };
  }

  // One block of columns of c M, for the rows' coefficients c (R, E).
  template <int R, typename Store>
  [[gnu::always_inline]] void mix_columns(const C* coefficients, const C* matrix, std::int64_t c, Store& store) {
    const C* block = matrix + blocked<C>(0, c, p_.experts);
    if (c + kColumns<C> <= p_.width)
      mix_block<C, R, true>(coefficients, block, p_.experts, c, store);
    else
      mix_block<C, R, false>(coefficients, block, p_.experts, c, store);
  }

  // Rows first .. first + R, the rows `at` .. of this block: d, s g, dz.
  template <int R, typename Row>
  void differentiate_rows(std::int64_t first, std::int64_t at, Row d) {
    using Pointer = decltype(d(0));
    if constexpr (std::is_same_v<Pointer, const C*>)
      for (int r = 0; r < R; ++r) d_rows_[at + r] = gradient_at_y(first + r, d_ + (at + r) * stride_);
    scale_gates(first, at, R);
    if (!needs_a_) return;
    Pointer rows[R];
    for (int r = 0; r < R; ++r) rows[r] = d(at + r);
    dots<C, R>(rows, operands_.V, p_.experts, Columns<C>::all(stride_), a_, [](std::int64_t) { return [](std::int64_t) {}; });
    differentiate_gates(std::integral_constant<int, R>(), first, at);
  }

  void scale_gates(std::int64_t first, std::int64_t at, int count) {
    const std::int64_t E = p_.experts;
    const C s = operands_.s;
    const C* g = static_cast<const C*>(call_.gates) + first * E;
    for (std::int64_t i = 0; i < count * E; ++i) sg_[at * E + i] = s * g[i];
  }

  // ds and, where it is needed, dz and db, of some rows, from a.
  template <typename Rows>
  [[gnu::always_inline]] void differentiate_gates(Rows rows, std::int64_t first, std::int64_t at) {
    const std::int64_t E = p_.experts;
    const C* g = static_cast<const C*>(call_.gates) + first * E;
    const C* external = call_.dgates == nullptr ? nullptr : static_cast<const C*>(call_.dgates) + first * E;
    const C* probs = call_.probs == nullptr ? nullptr : static_cast<const C*>(call_.probs) + first * E;
    with_experts(E, [&](auto experts) { differentiate_gates(rows, experts, g, external, probs, dz_ + at * E); });
  }

  template <typename Rows, typename Count>
  [[gnu::always_inline]] void differentiate_gates(Rows rows, Count experts, const C* g, const C* external, const C* probs, C* dz) {
    const C s = operands_.s;
    double ds = 0;
#pragma omp simd reduction(+ : ds)
    for (std::int64_t i = 0; i < rows * experts; ++i) ds += static_cast<double>(g[i]) * a_[i];
    partial_->ds += ds;
    if (!needs_dz_) return;
    for (std::int64_t i = 0; i < rows * experts; ++i) dg_[i] = s * a_[i] + (external == nullptr ? C(0) : external[i]);
    route_backward(g, probs, dg_, rows, experts, dz);
    double* db = partial_->db.data();
    for (int r = 0; r < rows; ++r)
      for (std::int64_t e = 0; e < experts; ++e) db[e] += dz[r * experts + e];
  }

  // du = d + dz W, a block of columns.
  template <int R, typename Row>
  void gradient_at_u(std::int64_t first, std::int64_t at, std::int64_t c, Row d) {
    auto store = storing_du(first, [d, at](std::int64_t r) { return d(at + r); });
    if (!prefetches_stores_) return mix_columns<R>(dz_ + at * p_.experts, operands_.W, c, store);
    const S* next = static_cast<const S*>(call_.du) + (first + block_) * p_.width;
    auto prefetch_and_store = [&store, next, D = p_.width](auto whole, int r, std::int64_t column, const V* dzW) {
      prefetch_registers<C, kRegisters>(next + r * D + column);
      store(whole, r, column, dzW);
    };
    mix_columns<R>(dz_ + at * p_.experts, operands_.W, c, prefetch_and_store);
  }

  template <typename Row>
  auto storing_du(std::int64_t first, Row row) const {
    return [row, D = p_.width, du = static_cast<S*>(call_.du) + first * p_.width](auto whole, int r, std::int64_t c, const V* dzW) {
      const auto* d = row(r) + c;
      S* out = du + r * D + c;
#pragma GCC unroll 8
      for (int k = 0; k < kRegisters; ++k) store_up_to(V::load(d + k * kLanes) + dzW[k], out + k * kLanes, D - c - k * kLanes, whole);
    };
  }

  const C* widened_y(std::int64_t row, C* scratch) const {
    return widen_row<C>(static_cast<const S*>(call_.y) + row * p_.width, p_.width, stride_, scratch);
  }

  // d = dy + unpool(dp), a row at a time and in order; dy itself where that is all.
  const C* gradient_at_y(std::int64_t row, C* scratch) {
    const S* dy = call_.dy == nullptr ? nullptr : static_cast<const S*>(call_.dy) + row * p_.width;
    if (call_.dnormed == nullptr) return dy == nullptr ? zero_ : widen_row<C>(dy, p_.width, stride_, scratch);
    if (p_.pool == Pool::kNone) {
      norm_backward(row, widened_y(row, pooled_), dy, scratch);
      return scratch;
    }
    const std::int64_t clip = row / p_.time, t = row % p_.time, at = t % p_.pool_size;
    const std::int64_t frames = std::min(p_.pool_size, p_.time - (t - at));
    if (at == 0) {
      pool_window(row, frames);
      norm_backward(clip * p_.pooled + t / p_.pool_size, pooled_, nullptr, dp_);
    }
    for (std::int64_t c = 0; c < p_.width; ++c) {
      const C share = p_.pool == Pool::kMax ? (argmax_[c] == at ? dp_[c] : C(0)) : dp_[c] / C(frames);
      scratch[c] = share + (dy == nullptr ? C(0) : static_cast<C>(widen(dy[c])));
    }
    return scratch;
  }

  // p = pool(y) over the window that starts at `row`, and which frame each maximum came from: the first of equal ones.
  void pool_window(std::int64_t row, std::int64_t frames) {
    const S* y = static_cast<const S*>(call_.y) + row * p_.width;
    for (std::int64_t c = 0; c < p_.width; ++c) pooled_[c] = static_cast<C>(widen(y[c]));
    if (p_.pool == Pool::kMax) std::fill(argmax_.begin(), argmax_.end(), 0);
    for (std::int64_t f = 1; f < frames; ++f)
      for (std::int64_t c = 0; c < p_.width; ++c) {
        const C value = static_cast<C>(widen(y[f * p_.width + c]));
        if (p_.pool != Pool::kMax) {
          pooled_[c] += value;
        } else if (value > pooled_[c] || value != value) {
          pooled_[c] = value;
          argmax_[c] = static_cast<std::int32_t>(f);
        }
      }
    if (p_.pool == Pool::kMean)
      for (std::int64_t c = 0; c < p_.width; ++c) pooled_[c] /= C(frames);
  }

  // out = rstd (t - mean(t) - xhat mean(t xhat)), plus dy where given; RMSNorm: without mean(t).
  void norm_backward(std::int64_t row, const C* p, const S* dy, C* out) {
    const std::int64_t D = p_.width;
    const C* stats = static_cast<const C*>(call_.stats);
    const C mean = stats[row], rstd = stats[p_.batch * p_.pooled + row];
    const S* dn = static_cast<const S*>(call_.dnormed) + row * D;
    const C* gamma = operands_.gamma;
    C *dgamma = partial_->dgamma.recent(), *dbeta = partial_->dbeta.recent();
    const V center = V::set(mean), reciprocal = V::set(rstd);
    V sum_t = V::zero(), sum_tx = V::zero();
    for (std::int64_t c = 0; c < D; c += kLanes) {
      prefetch(dn + V::kRows * D + c);                  // a tile ahead: nothing else asks for dn
      const V incoming = load_up_to<C>(dn + c, D - c);  // zero past the end: adds nothing to the sums
      const V xhat = (V::load(p + c) - center) * reciprocal;
      const V t = gamma == nullptr ? incoming : incoming * V::load(gamma + c);
      t.store(t_ + c);
      sum_t = sum_t + t;
      sum_tx = fma(t, xhat, sum_tx);
      if (dgamma != nullptr) fma(incoming, xhat, V::load(dgamma + c)).store(dgamma + c);
      if (dbeta != nullptr) (V::load(dbeta + c) + incoming).store(dbeta + c);
    }
    const V mean_t = V::set(p_.norm == Norm::kLayer ? sum_t.sum() / C(D) : C(0));
    const V mean_tx = V::set(sum_tx.sum() / C(D));
    for (std::int64_t c = 0; c < D; c += kLanes) {
      const V xhat = (V::load(p + c) - center) * reciprocal;
      V value = (V::load(t_ + c) - mean_t - xhat * mean_tx) * reciprocal;
      if (dy != nullptr) value = value + load_up_to<C>(dy + c, D - c);
      store_up_to(value, out + c, D - c);  // what follows the row stays zero
    }
  }

  const Backward& call_;
  const Problem& p_;
  const Operands<C>& operands_;
  const bool prefetches_stores_ = prefetches_stores<S>(p_, 2 + (call_.dy != nullptr) + (call_.dnormed != nullptr));
  Partial<C>* partial_ = nullptr;
  std::int64_t stride_;
  int block_;
  bool needs_a_, needs_dz_;
  Buffer<C> scratch_;
  C *d_, *pooled_, *dp_, *t_, *zero_, *u_, *dz_, *sg_, *a_, *dg_;
  const C* d_rows_[kTileRows];
  std::vector<std::int32_t> argmax_;
  struct Tiled {
    Tiled(std::int64_t experts, std::int64_t width) : unit(experts, width), dz(experts), sg(experts), rows(width) {}
    Tiles unit;
    Tiles::Coefficients dz, sg;
    TiledRows rows;
  };
  std::optional<Tiled> tiled_;
};

// As many as threads can share evenly: an even number. In 192 rows no chain ends, so that the sums in double, and adding them up, are for
// streams of more than 64 such shards. A shard's sums are zeroed and added up besides, so it has to be larger than the forward's.
inline int backward_shards(const Problem& p) {
  const std::int64_t pairs = (p.frames() + 2 * 192 - 1) / (2 * 192);
  return useful_shards(p, static_cast<int>(std::min<std::int64_t>(64, 2 * pairs)), 4 * kSmallestShard);
}

template <typename C, typename S>
void backward(const Backward& call, int threads) {
  using Pass = BackwardPass<C, S>;
  const Problem& p = call.problem;
  const int shards = backward_shards(p);
  threads = std::min(threads, shards);
  Forms forms;
  forms.tiles = takes_tiles<C, S>(p, 16);
  forms.backward = true;
  ThreadOperands<C> operands(p, threads, forms);
  // In one piece, which the C library keeps for the next call: pieces by the shard go back to the system, to be faulted in again.
  const std::int64_t D = p.width, E = p.experts, stride = stride_of<C>(p), room = Partial<C>::room(call, stride);
  Buffer<C> rooms(shards * room);
  prefer_huge_pages(rooms.data(), shards * room * static_cast<std::int64_t>(sizeof(C)));
  std::vector<std::unique_ptr<Partial<C>>> partials(shards);
  parallel(shards, threads, [&](int thread, Shards& all) {
    int shard = all.draw(thread);
    if (shard < 0) return;
    const Operands<C> mine = operands.of(thread);
    Pass pass(call, mine);
    for (; shard >= 0; shard = all.draw(thread)) {
      partials[shard] = std::make_unique<Partial<C>>(call, stride, rooms.data() + shard * room);
      pass.run(shard_of(p, shard, shards, Pass::block_of(call, forms.tiles)), *partials[shard]);
    }
  });

  const int blocks = static_cast<int>(stride / kColumns<C>);
  parallel(blocks, threads, [&](int thread, Shards& all) {
    for (int block; (block = all.draw(thread)) >= 0;) {
      add_up(partials, &Partial<C>::dW, block, E, D, call.dweight);
      add_up(partials, &Partial<C>::dV, block, E, D, call.dvectors);
      add_up(partials, &Partial<C>::dgamma, block, 1, D, call.dnorm_weight);
      add_up(partials, &Partial<C>::dbeta, block, 1, D, call.dnorm_bias);
    }
  });
  double ds = 0;
  std::vector<double> db(E, 0.0);
  for (const auto& part : partials) {
    ds += part->ds;
    for (std::int64_t e = 0; e < E; ++e) db[e] += part->db[e];
  }
  if (call.dscale != nullptr) *static_cast<C*>(call.dscale) = static_cast<C>(ds);
  if (call.dbias != nullptr) std::copy(db.begin(), db.end(), static_cast<C*>(call.dbias));
}

}  // namespace steer::cpu::STEER_NAMESPACE
