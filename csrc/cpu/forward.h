// Forward of a steering pass on the CPU: one walk over the frames, a few rows at a time, which stay in L1 or L2 between the router's dot
// products and the norm.
//
//   u = x + r    z = u W^T + b    g = route(z)    y = u + s (g V)    p = pool(y)    n = norm(p)
#pragma once

#include <algorithm>
#include <cmath>
#include <optional>
#include <type_traits>
#include <utility>
#include <vector>

#include "operands.h"
#include "parallel.h"
#include "routing.h"

namespace steer::cpu::STEER_NAMESPACE {

template <typename C>
constexpr bool kTurns = sizeof(Vector<C>) == 64;  // with AVX-512: with narrower registers arithmetic is slow enough that reading keeps up

// By turns on Intel's processors alone: the prefetchers of AMD's (Zen 4) keep up without, and there the turns cost more than they save.
inline bool turns_pay() {
#if defined(__AVX512F__)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

template <typename C>
constexpr std::int64_t kTurn = 4 * kColumns<C>;  // columns

template <typename C, typename S>
class ForwardPass {
  using V = Vector<C>;
  static constexpr int kLanes = V::kLanes;
  static constexpr std::int64_t kSplit = 16;  // experts whose sums are worth putting down between turns

 public:
  ForwardPass(const Forward& call, const Operands<C>& operands)
      : call_(call), p_(call.problem), operands_(operands), stride_(operands.stride) {
    const std::int64_t rows = operands.tiled ? kTileRows : V::kRows;
    scratch_.reserve((rows + 2) * stride_ + rows * p_.experts + kSplit * V::kRows * kLanes);
    C* next = scratch_.data();
    const auto take = [&next](std::int64_t count) { return std::exchange(next, next + count); };
    u_ = take(rows * stride_);
    y_ = take(stride_);
    pooled_ = take(stride_);
    z_ = take(rows * p_.experts);
    sums_ = take(kSplit * V::kRows * kLanes);
    if (!p_.dense()) selection_.resize((rows + 2) * p_.experts);
    // Rows are widened up to `width`; what follows must be zero, and stays so.
    std::fill(u_, u_ + (rows + 2) * stride_, C(0));
    if constexpr (kTiles<S>)
      if (operands.tiled) tiled_.emplace(p_.experts, p_.width);
  }

  void run(Shard shard) {
    std::int64_t row = shard.first;
    if constexpr (kTiles<S>)
      if (tiled_)
        for (; row < shard.last; row += kTileRows) steer_tiles(row, static_cast<int>(std::min<std::int64_t>(kTileRows, shard.last - row)));
    if constexpr (kTurns<C> && std::is_same_v<C, S>)
      if (takes_turns()) row = steer_by_turns(row, shard.last);
    for (; row + V::kRows <= shard.last; row += V::kRows) steer_rows<V::kRows>(row);
    for (; row < shard.last; ++row) steer_rows<1>(row);
  }

 private:
  template <int R>
  void steer_rows(std::int64_t first) {
    const std::int64_t D = p_.width;
    const S* x = static_cast<const S*>(call_.x) + first * D;
    if constexpr (!std::is_same_v<C, S>)
      if (kWidensInLoops && call_.residual == nullptr && D == stride_) {
        const S* u[R];
        for (int r = 0; r < R; ++r) u[r] = x + r * D;
        return steer_rows<R>(first, x, u);
      }
    const C* u[R];
    for (int r = 0; r < R; ++r) u[r] = add_residual(x + r * D, first + r, u_ + r * stride_);
    steer_rows<R>(first, x, u);
  }

  // u: x itself, to be widened on the way, or the rows made from it.
  template <int R, typename U>
  void steer_rows(std::int64_t first, const S* x, const U* const* u) {
    const std::int64_t D = p_.width, E = p_.experts;
    router_logits<R>(u, x);
    const C* g = route_rows(std::integral_constant<int, R>(), first);
    const bool two_tiles = E <= 2 * V::kExperts;  // which have prefetched four of the next rows
    const auto steer = steering(u, first);
    const auto emit = [&](auto whole, int r, std::int64_t d, const V* gV) __attribute__((always_inline)) {
      if (r >= 4 && two_tiles) prefetch_registers<C, kRegisters>(x + (R + r) * D + d);
      steer(whole, r, d, gV);
    };
    if (prefetches_stores_)
      mix_prefetching<R>(g, first + R, emit);
    else
      mix<C, R>(g, operands_.V, E, D, emit);
    norm_rows(first, R);
  }

  // mix with the lines of y, and of the residual, from row `next` on prefetched.
  template <int R, typename Emit>
  void mix_prefetching(const C* g, std::int64_t next, Emit&& emit) {
    const std::int64_t D = p_.width, E = p_.experts;
    const S* y = static_cast<const S*>(call_.y) + next * D;
    const S* residual = call_.residual == nullptr ? y : static_cast<const S*>(call_.residual) + next * D;
    mix<C, R>(g, operands_.V, E, D, [&](auto whole, int r, std::int64_t d, const V* gV) {
      prefetch_registers<C, kRegisters>(y + r * D + d);
      if (residual != y) prefetch_registers<C, kRegisters>(residual + r * D + d);
      emit(whole, r, d, gV);
    });
  }

  // Where that pays, rows lie ready in the stream, and are too wide to stay in L1 between their dot products and their mix.
  bool takes_turns() const { return turns_pay() && call_.residual == nullptr && p_.width == stride_ && p_.width >= 3 * kTurn<C>; }

  // Tiles of rows as in steer_rows, as many as there are from `first` on; returns the row after them. The next rows' dot products are
  // taken between the blocks of columns of these rows' mix. The first wait for the stream to be read, the second for it to be written: by
  // turns, both come evenly, of a few rows and in the order of memory, and the prefetchers between L2 and L3 keep up by themselves.
  std::int64_t steer_by_turns(std::int64_t first, std::int64_t last) {
    constexpr int R = V::kRows;
    const std::int64_t D = p_.width, E = p_.experts, turn = E <= kSplit ? kTurn<C> : D;
    const C* row = static_cast<const C*>(call_.x) + first * D;
    const C *u[R], *next[R];
    const auto add_up_next = [&](std::int64_t from, std::int64_t to) {
      for (int r = 0; r < R; ++r) next[r] = row + r * D;
      dots<C, R>(next, operands_.W, E, {from, to, D, sums_}, z_, [](std::int64_t) { return [](std::int64_t) {}; });
    };
    if (first + R <= last) add_up_next(0, D);
    for (; first + R <= last; first += R) {
      row += R * D;
      std::copy_n(next, R, u);
      const C* g = route_rows(std::integral_constant<int, R>(), first);
      const auto steer = steering(u, first);
      for (std::int64_t d = 0; d < D; d += turn) {
        const std::int64_t to = std::min(d + turn, D);
        if (first + 2 * R <= last) add_up_next(d, to);
        for (std::int64_t c = d; c < to; c += kColumns<C>) mix_block<C, R, true>(g, operands_.V + c * E, E, c, steer);
      }
      norm_rows(first, R);
    }
    return first;
  }

  // The same for up to kTileRows rows on the matrix unit.
  void steer_tiles(std::int64_t first, int count) {
    const std::int64_t D = p_.width;
    const S* x = static_cast<const S*>(call_.x) + first * D;
    const auto fetch_next = [next = x + kTileRows * D, D](std::int64_t d) {
      for (int r = 0; r < kTileRows; ++r)
        for (int k = 0; k < kColumns<C>; k += 64 / sizeof(S)) prefetch(next + r * D + d + k);
    };
    TiledRows& rows = tiled_->rows;
    if (call_.residual == nullptr) {
      const S* u[kTileRows];
      for (int r = 0; r < count; ++r) u[r] = x + r * D;
      tiled_->unit.dots(rows.whole(x, count), nullptr, count, operands_.dots_tiles, z_, fetch_next);
      mix_tiles(first, count, steering(u, first));
    } else {
      const C* u[kTileRows];
      for (int r = 0; r < count; ++r) {
        u[r] = add_residual(x + r * D, first + r, u_ + r * stride_);
        rows.cut(u[r], r);
      }
      tiled_->unit.dots(rows.hi(), rows.rest(), count, operands_.dots_tiles, z_, fetch_next);
      mix_tiles(first, count, steering(u, first));
    }
    norm_rows(first, count);
  }

  template <typename Steer>
  void mix_tiles(std::int64_t first, int count, Steer&& steer) {
    Tiles& unit = tiled_->unit;
    unit.cut(route_rows(count, first), count, tiled_->gates);
    // A block is emitted while the unit is at the next one.
    for (std::int64_t d = 0; d <= p_.width; d += kColumns<C>) {
      const int which = static_cast<int>(d / kColumns<C> % 2);
      if (d < p_.width) unit.mix_block(tiled_->gates, operands_.V_tiles, d, which);
      if (d > 0) unit.emit_block(1 - which, count, d - kColumns<C>, steer);
    }
  }

  // g = route(z + b) of some rows, from `first` on.
  template <typename Rows>
  [[gnu::always_inline]] const C* route_rows(Rows rows, std::int64_t first) {
    const std::int64_t E = p_.experts;
    C* g = static_cast<C*>(call_.gates) + first * E;
    add_bias(z_, operands_.b, rows, E);
    if (p_.dense()) {
      softmax(z_, rows, E, g);
    } else {
      C* probs = call_.probs == nullptr ? nullptr : static_cast<C*>(call_.probs) + first * E;
      route_selected(z_, p_, rows, g, probs, selection_.data());
    }
    return g;
  }

  // y = u + s gV, a block of a row's columns at a time.
  template <typename U>
  auto steering(const U* const* u, std::int64_t first) const {
    return [u, s = V::set(operands_.s), D = p_.width, y = static_cast<S*>(call_.y) + first * p_.width](auto whole, int r, std::int64_t d,
                                                                                                       const V* gV) {
      const U* from = u[r] + d;
      S* out = y + r * D + d;
#pragma GCC unroll 8
      for (int k = 0; k < kRegisters; ++k)
        store_up_to(fma(s, gV[k], V::load(from + k * kLanes)), out + k * kLanes, D - d - k * kLanes, whole);
    };
  }

  // The norm reads y as it was stored, rounded: the backward has nothing else, and must find the same xhat and maxima.
  void norm_rows(std::int64_t first, int count) {
    if (p_.norm == Norm::kNone) return;
    const S* y = static_cast<const S*>(call_.y) + first * p_.width;
    for (int r = 0; r < count; ++r) pool_and_norm(first + r, widen_row<C>(y + r * p_.width, p_.width, stride_, y_));
  }

  // z = u W^T, without b. Every tile of experts prefetches two of the next rows, a line at a time.
  template <int R, typename U>
  void router_logits(const U* const* u, const S* x) {
    const auto fetch_next = [next = x + R * p_.width, width = p_.width](std::int64_t tile) {
      return [even = next + 2 * tile % R * width, odd = next + (2 * tile + 1) % R * width](std::int64_t d) {
        prefetch(even + d);
        prefetch(odd + d);
      };
    };
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<S, BFloat16>)
      if (operands_.bfloat16_W != nullptr) {
        const BFloat16* rows[R];
        for (int r = 0; r < R; ++r) rows[r] = x + r * p_.width;
        return dots<R>(rows, operands_.bfloat16_W, p_.experts, stride_, z_, fetch_next);
      }
#endif
    dots<C, R>(u, operands_.W, p_.experts, Columns<C>::all(stride_), z_, fetch_next);
  }

  // u = x + r, widened; x itself where that is the same.
  const C* add_residual(const S* x, std::int64_t row, C* scratch) const {
    if (call_.residual == nullptr) return widen_row<C>(x, p_.width, stride_, scratch);
    const S* residual = static_cast<const S*>(call_.residual) + row * p_.width;
    for (std::int64_t d = 0; d < p_.width; d += kLanes)
      (load_up_to<C>(x + d, p_.width - d) + load_up_to<C>(residual + d, p_.width - d)).store(scratch + d);
    return scratch;
  }

  // Rows come in order: the first of a window starts the pool, the last one ends it.
  void pool_and_norm(std::int64_t row, const C* y) {
    if (p_.pool == Pool::kNone) return norm(row, y);
    const std::int64_t clip = row / p_.time, t = row % p_.time, at = t % p_.pool_size;
    if (at == 0)
      std::copy(y, y + stride_, pooled_);
    else if (p_.pool == Pool::kMax)
      for (std::int64_t d = 0; d < p_.width; ++d) pooled_[d] = (y[d] > pooled_[d] || y[d] != y[d]) ? y[d] : pooled_[d];
    else
      for (std::int64_t d = 0; d < p_.width; ++d) pooled_[d] += y[d];
    if (at + 1 < p_.pool_size && t + 1 < p_.time) return;
    if (p_.pool == Pool::kMean)
      for (std::int64_t d = 0; d < p_.width; ++d) pooled_[d] /= C(at + 1);
    norm(clip * p_.pooled + t / p_.pool_size, pooled_);
  }

  void norm(std::int64_t row, const C* p) const {
    const std::int64_t D = p_.width, whole = D / kLanes * kLanes;
    C mean = 0;
    if (p_.norm == Norm::kLayer) {
      V sum = V::zero();
      for (std::int64_t d = 0; d < stride_; d += kLanes) sum = sum + V::load(p + d);
      mean = sum.sum() / C(D);
    }
    const V about = V::set(mean);
    V squares = V::zero(), sum = V::zero();
    for (std::int64_t d = 0; d < whole; d += kLanes) {
      const V t = V::load(p + d) - about;
      squares = fma(t, t, squares);
      sum = sum + t;
    }
    C variance = squares.sum(), off = sum.sum();
    for (std::int64_t d = whole; d < D; ++d) {
      const C t = p[d] - mean;
      variance += t * t;
      off += t;
    }
    variance /= C(D);
    if (p_.norm == Norm::kLayer) {
      // The mean is off by what a long chain of additions has lost, which counts where it is large against the deviation. In the small
      // numbers of this pass it shows, and little is lost.
      off /= C(D);
      mean += off;
      if (std::isfinite(variance)) variance = std::max(variance - off * off, C(0));
    }
    const V center = V::set(mean);
    const C rstd = C(1) / std::sqrt(variance + C(p_.eps));

    C* stats = static_cast<C*>(call_.stats);
    stats[row] = mean;
    stats[p_.batch * p_.pooled + row] = rstd;
    S* n = static_cast<S*>(call_.normed) + row * D;
    const C *gamma = operands_.gamma, *beta = operands_.beta;
    const V reciprocal = V::set(rstd);
    for (std::int64_t d = 0; d < D; d += kLanes) {
      V value = (V::load(p + d) - center) * reciprocal;
      if (gamma != nullptr) value = value * V::load(gamma + d);
      if (beta != nullptr) value = value + V::load(beta + d);
      if (prefetches_stores_) prefetch(n + V::kRows * D + d);
      store_up_to(value, n + d, D - d);
    }
  }

  const Forward& call_;
  const Problem& p_;
  const Operands<C>& operands_;
  const bool prefetches_stores_ = prefetches_stores<S>(p_, 2 + (call_.residual != nullptr) + (p_.norm != Norm::kNone));
  std::int64_t stride_;
  Buffer<C> scratch_;
  C *u_, *y_, *pooled_, *z_, *sums_;
  std::vector<Integer<C>> selection_;
  struct Tiled {
    Tiled(std::int64_t experts, std::int64_t width) : unit(experts, width), gates(experts), rows(width) {}
    Tiles unit;
    Tiles::Coefficients gates;
    TiledRows rows;
  };
  std::optional<Tiled> tiled_;
};

template <typename C, typename S>
void forward(const Forward& call, int threads) {
  const Problem& p = call.problem;
  // Shards of a fraction of a thread's share even out a core that is busy with something else.
  const int shards = useful_shards(p, threads == 1 ? 1 : 4 * threads);
  threads = std::min(threads, shards);
  Forms forms;
  forms.tiles = takes_tiles<C, S>(p, call.residual == nullptr ? 8 : 32);  // a sum of two has to be cut
#if defined(__AVX512BF16__)
  // Only where u and W are bfloat16 as they come, so that no product is rounded.
  forms.bfloat16_W = !forms.tiles && p.stream == DType::kBFloat16 && p.weight.dtype == DType::kBFloat16 && call.residual == nullptr &&
                     p.width == stride_of<C>(p);
#endif
  ThreadOperands<C> operands(p, threads, forms);
  parallel(shards, threads, [&](int thread, Shards& all) {
    int shard = all.draw(thread);
    if (shard < 0) return;
    const Operands<C> mine = operands.of(thread);
    ForwardPass<C, S> pass(call, mine);
    for (; shard >= 0; shard = all.draw(thread)) pass.run(shard_of(p, shard, shards, forms.tiles ? kTileRows : Vector<C>::kRows));
  });
}

}  // namespace steer::cpu::STEER_NAMESPACE
