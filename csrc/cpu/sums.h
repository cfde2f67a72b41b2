// What the backward sums over all frames: dW, dV, db, ds and the norm's gradients, a shard at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

#include "../steer.h"
#include "buffer.h"
#include "primitives.h"

namespace steer::cpu::STEER_NAMESPACE {

// Sums over very many rows of an array of numbers. A chain of n additions in float32 rounds off about sqrt(n) / 7 units in the last place,
// more than plain PyTorch's blocked products do once n is in the thousands: so chains are short, and their ends are summed in double.
template <typename C>
class LongSum {
 public:
  // Zeros the room for the chains, `count` numbers from `room` on, and returns what follows.
  C* start(C* room, std::int64_t count) {
    recent_ = room;
    count_ = count;
    return std::fill_n(room, count, C(0));
  }
  bool wanted() const { return count_ > 0; }
  C* recent() { return recent_; }  // to be added to; null where not wanted

  void end_chain() {
    if (!wanted()) return;
    const bool first = ended_.data() == nullptr;
    double* ended = ended_.reserve(count_);
    for (std::int64_t i = 0; i < count_; ++i) ended[i] = first ? recent_[i] : ended[i] + recent_[i];
    std::fill_n(recent_, count_, C(0));
  }

  // total[i] += sum[at + i] for i < count
  void add_to(double* total, std::int64_t at, std::int64_t count) {
    const C* recent = recent_ + at;
    for (std::int64_t i = 0; i < count; ++i) total[i] += recent[i];
    if (ended_.data() == nullptr) return;
    const double* ended = ended_.data() + at;
    for (std::int64_t i = 0; i < count; ++i) total[i] += ended[i];
  }

 private:
  std::int64_t count_ = 0;
  C* recent_ = nullptr;
  Buffer<double> ended_;
};

// One shard's sums. What is small is summed in double throughout.
template <typename C>
struct Partial {
  LongSum<C> dW, dV, dgamma, dbeta;
  std::vector<double> db;
  double ds = 0;

  static std::int64_t room(const Backward& call, std::int64_t stride) { return 2 * (call.problem.experts + 1) * stride; }

  // `room`: for as many numbers.
  Partial(const Backward& call, std::int64_t stride, C* room) : db(call.problem.experts, 0.0) {
    const std::int64_t matrix = call.problem.experts * stride;
    if (call.dweight != nullptr) room = dW.start(room, matrix);
    if (call.dvectors != nullptr) room = dV.start(room, matrix);
    if (call.dnorm_weight != nullptr) room = dgamma.start(room, stride);
    if (call.dnorm_bias != nullptr) dbeta.start(room, stride);
  }

  void end_chains() {
    for (LongSum<C>* sum : {&dW, &dV, &dgamma, &dbeta}) sum->end_chain();
  }
};

// out (rows, width) = the sum over shards of partials, which are `rows` blocked rows; the columns of one block.
template <typename C>
void add_up(std::vector<std::unique_ptr<Partial<C>>>& partials, LongSum<C> Partial<C>::* sum, std::int64_t block, std::int64_t rows,
            std::int64_t width, void* result) {
  if (result == nullptr) return;
  const std::int64_t first = block * kColumns<C>, columns = std::min<std::int64_t>(kColumns<C>, width - first);
  for (std::int64_t row = 0; row < rows; ++row) {
    double total[kColumns<C>] = {};
    for (const auto& partial : partials) ((*partial).*sum).add_to(total, blocked<C>(row, first, rows), kColumns<C>);
    C* out = static_cast<C*>(result) + row * width + first;
    for (std::int64_t c = 0; c < columns; ++c) out[c] = static_cast<C>(total[c]);
  }
}

}  // namespace steer::cpu::STEER_NAMESPACE
