// Operands made ready for the loops: parameters widened and padded to whole registers, aligned scratch, shares of the frames.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>

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

// A vector parameter in type C, padded with zeros to `stride`, in `room`, which is moved behind it; null where there is none.
template <typename C>
const C* padded(const Parameter& parameter, std::int64_t width, std::int64_t stride, C*& room) {
  if (parameter.data == nullptr) return nullptr;
  C* out = room;
  widen_into(parameter, 0, width, out);
  std::fill(out + width, out + stride, C(0));
  room += stride;
  return out;
}

// W or V (E, D) as numbers of type T, in the blocked order of primitives.h, columns padded with zeros to `stride`.
template <typename C, typename T>
const T* blocked(const Parameter& parameter, std::int64_t experts, std::int64_t width, std::int64_t stride, T*& room) {
  const T* start = room;
  for (std::int64_t d = 0; d < stride; d += kColumns<C>) {
    const std::int64_t columns = std::min<std::int64_t>(kColumns<C>, width - d);
    for (std::int64_t e = 0; e < experts; ++e, room += kColumns<C>) {
      widen_into(parameter, e * width + d, columns, room);
      std::fill(room + columns, room + kColumns<C>, T{});
    }
  }
  return start;
}

// Rows as the loops want them: whole blocks of columns.
template <typename C>
std::int64_t stride_of(const Problem& p) {
  return (p.width + kColumns<C> - 1) / kColumns<C> * kColumns<C>;
}

template <typename C>
struct Operands {
  // Numbers that an instance needs room for, whole cache lines.
  static std::int64_t room(const Problem& p) { return (2 * p.experts + 2) * stride_of<C>(p) + (p.experts + 1 + 15) / 16 * 16; }

  // `short_W`: W as it is stored, in bfloat16, in the place of W.
  Operands(const Problem& p, bool short_W, C* room)
      : stride(stride_of<C>(p)),
        W(short_W ? nullptr : blocked<C>(p.weight, p.experts, p.width, stride, room)),
        bfloat16_W(short_W ? place_bfloat16(p, stride, room) : nullptr),
        V(blocked<C>(p.vectors, p.experts, p.width, stride, room)),
        gamma(padded(p.norm_weight, p.width, stride, room)),
        beta(padded(p.norm_bias, p.width, stride, room)),
        b(padded(p.bias, p.experts, p.experts, room)),
        s(*padded(p.scale, 1, 1, room)) {}

  const std::int64_t stride;
  const C* const W;
  const BFloat16* const bfloat16_W;
  const C *const V, *const gamma, *const beta, *const b;
  const C s;

 private:
  static const BFloat16* place_bfloat16(const Problem& p, std::int64_t stride, C*& room) {
    BFloat16* place = reinterpret_cast<BFloat16*>(room);
    room += p.experts * stride;
    return blocked<C>(p.weight, p.experts, p.width, stride, place);
  }
};

// Every thread's operands: a copy each, which costs it less than fetching its neighbour's out of that one's cache; or one for all, where
// copies would not stay in a cache of a core's own, or add up to much.
template <typename C>
class ThreadOperands {
 public:
  ThreadOperands(const Problem& p, int threads, bool short_W = false)
      : p_(p), short_W_(short_W), room_(Operands<C>::room(p)), own_(bytes(1) <= kOwnBytes && bytes(threads) <= kAllBytes) {
    memory_.reserve((own_ ? threads : 1) * room_);
    if (!own_) shared_.emplace(p, short_W, memory_.data());
  }

  // For `thread`, which asks once.
  Operands<C> of(int thread) { return own_ ? Operands<C>(p_, short_W_, memory_.data() + thread * room_) : *shared_; }

 private:
  static constexpr std::int64_t kOwnBytes = 1 << 20, kAllBytes = 16 << 20;

  std::int64_t bytes(int copies) const { return copies * room_ * static_cast<std::int64_t>(sizeof(C)); }

  const Problem& p_;
  const bool short_W_;
  const std::int64_t room_;
  const bool own_;
  Buffer<C> memory_;
  std::optional<Operands<C>> shared_;
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
