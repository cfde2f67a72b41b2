// Operands made ready for the loops: parameters widened and padded to whole registers, aligned scratch, shares of the frames.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "../steer.h"
#include "primitives.h"

namespace steer::cpu::STEER_NAMESPACE {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Room for `count` numbers, aligned to a cache line, uninitialised.
template <typename C>
class Buffer {
 public:
  explicit Buffer(std::int64_t count = 0) { reserve(count); }
  C* reserve(std::int64_t count) {
    if (count <= count_) return data();
    const std::size_t bytes = (static_cast<std::size_t>(count) * sizeof(C) + 63) / 64 * 64;
    memory_.reset(std::aligned_alloc(64, bytes));
    if (memory_ == nullptr) throw std::bad_alloc();
    count_ = count;
    return data();
  }
  C* data() { return static_cast<C*>(memory_.get()); }

 private:
  std::unique_ptr<void, Free> memory_;
  std::int64_t count_ = 0;
};

template <typename C, typename S>
void widen_into(const S* from, std::int64_t count, C* to) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = static_cast<C>(widen(from[i]));
}

// What bfloat16 dot products read: stored so, taken so.
inline void widen_into(const Parameter& from, std::int64_t offset, std::int64_t count, BFloat16* to) {
  std::copy_n(static_cast<const BFloat16*>(from.data) + offset, count, to);
}

template <typename C>
void widen_into(const Parameter& from, std::int64_t offset, std::int64_t count, C* to) {
  switch (from.dtype) {
    case DType::kFloat32:
      return widen_into(static_cast<const float*>(from.data) + offset, count, to);
    case DType::kFloat16:
      return widen_into(static_cast<const Half*>(from.data) + offset, count, to);
    case DType::kBFloat16:
      return widen_into(static_cast<const BFloat16*>(from.data) + offset, count, to);
    case DType::kFloat64:
      return widen_into(static_cast<const double*>(from.data) + offset, count, to);
  }
}

// A vector parameter in type C, padded with zeros to `stride`.
template <typename C>
class Padded {
 public:
  Padded(const Parameter& parameter, std::int64_t width, std::int64_t stride) {
    if (parameter.data == nullptr) return;
    C* out = buffer_.reserve(stride);
    widen_into(parameter, 0, width, out);
    std::fill(out + width, out + stride, C(0));
    data_ = out;
  }
  const C* get() const { return data_; }

 private:
  Buffer<C> buffer_;
  const C* data_ = nullptr;
};

// W or V (E, D) as numbers of type T, in the blocked order of primitives.h, columns padded with zeros to `stride`.
template <typename C, typename T = C>
class Blocked {
 public:
  Blocked() = default;
  Blocked(const Parameter& parameter, std::int64_t experts, std::int64_t width, std::int64_t stride) {
    T* out = buffer_.reserve(experts * stride);
    for (std::int64_t d = 0; d < stride; d += kColumns<C>) {
      const std::int64_t columns = std::min<std::int64_t>(kColumns<C>, width - d);
      for (std::int64_t e = 0; e < experts; ++e, out += kColumns<C>) {
        widen_into(parameter, e * width + d, columns, out);
        std::fill(out + columns, out + kColumns<C>, T{});
      }
    }
  }
  const T* get() { return buffer_.data(); }

 private:
  Buffer<T> buffer_;
};

template <typename C>
struct Operands {
  explicit Operands(const Problem& p)
      : stride((p.width + kColumns<C> - 1) / kColumns<C> * kColumns<C>),
        blocked_W_(p.weight, p.experts, p.width, stride),
        blocked_V_(p.vectors, p.experts, p.width, stride),
        b_(p.bias, p.experts, p.experts),
        s_(p.scale, 1, 1),
        gamma_(p.norm_weight, p.width, stride),
        beta_(p.norm_bias, p.width, stride),
        W(blocked_W_.get()),
        V(blocked_V_.get()),
        b(b_.get()),
        s(*s_.get()),
        gamma(gamma_.get()),
        beta(beta_.get()) {}

  const std::int64_t stride;

 private:
  Blocked<C> blocked_W_, blocked_V_;
  Padded<C> b_, s_, gamma_, beta_;

 public:
  const C *const W, *const V, *const b;
  const C s;
  const C *const gamma, *const beta;
};

// A row of storage type S as a row of C padded with zeros: the row itself where it is one, else widened into `scratch`.
template <typename C, typename S>
inline const C* widen_row(const S* row, std::int64_t width, std::int64_t stride, C* scratch) {
  if constexpr (sizeof(S) == sizeof(C))
    if (width == stride) return reinterpret_cast<const C*>(row);
  for (std::int64_t d = 0; d < width; d += Vector<C>::kLanes) load_up_to<C>(row + d, width - d).store(scratch + d);
  return scratch;
}

// The first and last row of a shard: whole units of `block` rows, or where frames are pooled of windows, never across `time`.
struct Shard {
  std::int64_t first, last;
};

inline Shard shard_of(const Problem& p, int index, int shards, std::int64_t block) {
  const bool pools = p.pool != Pool::kNone;
  const std::int64_t unit = pools ? p.pool_size : block, clip = pools ? p.time : p.frames();
  const std::int64_t per_clip = (clip + unit - 1) / unit, units = pools ? p.batch * per_clip : per_clip;
  const auto row = [&](std::int64_t u) { return u / per_clip * clip + std::min(u % per_clip * unit, clip); };
  return {row(units * index / shards), row(units * (index + 1) / shards)};
}

// As many shards as `wanted`, but none so small that handing it to a thread takes longer than computing it: some microseconds, which are
// this many steps, of an expert each or of reading, adding and writing an element.
constexpr std::int64_t kSmallestShard = 65536;

inline int useful_shards(const Problem& p, int wanted, std::int64_t smallest = kSmallestShard) {
  const std::int64_t work = p.frames() * p.width * (p.experts + 4);
  return static_cast<int>(std::max<std::int64_t>(1, std::min<std::int64_t>({wanted, work / smallest, p.frames()})));
}

}  // namespace steer::cpu::STEER_NAMESPACE
