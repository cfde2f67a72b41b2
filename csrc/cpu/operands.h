// Operands made ready for the loops: parameters widened and padded to whole registers, aligned scratch, shares of the frames.
#pragma once

#include <algorithm>
#include <optional>

#include "../steer.h"
#include "buffer.h"
#include "primitives.h"
#include "tiles.h"

namespace steer::cpu::STEER_NAMESPACE {

template <typename C, typename S>
void widen_into(const S* from, std::int64_t count, C* to) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = static_cast<C>(widen(from[i]));
}

// What bfloat16 dot products read: copied as it is stored.
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

// A vector parameter in type C, padded with zeros to `stride`, in `room`, which is moved past it; null where there is none.
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

// Whether a pass over so many streams prefetches lines that nothing else asks for before they are needed: those that are going to be
// written, and a residual's. On AMD's processors (seen on Zen 4) it pays where the streams do not stay near; on Intel's, prefetching what
// is written has made passes slower.
template <typename S>
bool prefetches_stores([[maybe_unused]] const Problem& p, [[maybe_unused]] int streams) {
#if defined(STEER_X86)
  constexpr std::int64_t kFar = 8 << 20;
  return streams * p.frames() * p.width * static_cast<std::int64_t>(sizeof(S)) > kFar && __builtin_cpu_is("amd");
#else
  return false;
#endif
}

// The forms a pass wants its matrices in.
struct Forms {
  bool bfloat16_W = false;  // W as it is stored, in the place of W
  bool tiles = false;       // what the matrix unit takes, in the place of both
  bool backward = false;
};

// Whether the matrix unit takes a pass for which it pays from so many experts on: streams and parameters in bfloat16, in rows of whole
// blocks, and enough frames that arranging the parameters counts for little.
template <typename C, typename S>
bool takes_tiles(const Problem& p, std::int64_t experts) {
  return kTiles<S> && p.weight.dtype == DType::kBFloat16 && p.vectors.dtype == DType::kBFloat16 && p.width == stride_of<C>(p) &&
         p.experts >= experts && p.frames() >= 192;
}

template <typename C>
struct Operands {
  // Numbers that an instance needs room for, whole cache lines.
  static std::int64_t room(const Problem& p, const Forms& forms) {
    std::int64_t matrices = 2 * p.experts * stride_of<C>(p);
    if constexpr (kHaveTiles)
      if (forms.tiles) matrices = Tiles::dots_room(p.experts, p.width) + (forms.backward ? 2 : 1) * Tiles::mix_room(p.experts, p.width);
    return matrices + 2 * stride_of<C>(p) + (p.experts + 1 + 15) / 16 * 16;
  }

  Operands(const Problem& p, const Forms& forms, C* room) : stride(stride_of<C>(p)), tiled(forms.tiles) {
    if constexpr (kHaveTiles)
      if (tiled) {
        const auto arrange = [&](auto arrange_for, const Parameter& matrix) {
          const C* start = room;
          room = arrange_for(static_cast<const BFloat16*>(matrix.data), p.experts, p.width, room);
          return start;
        };
        dots_tiles = arrange(Tiles::arrange_for_dots, forms.backward ? p.vectors : p.weight);
        V_tiles = arrange(Tiles::arrange_for_mix, p.vectors);
        if (forms.backward) W_tiles = arrange(Tiles::arrange_for_mix, p.weight);
      }
    if (!tiled) {
      if (forms.bfloat16_W) {
        BFloat16* place = reinterpret_cast<BFloat16*>(room);
        room += p.experts * stride;
        bfloat16_W = blocked<C>(p.weight, p.experts, p.width, stride, place);
      } else {
        W = blocked<C>(p.weight, p.experts, p.width, stride, room);
      }
      V = blocked<C>(p.vectors, p.experts, p.width, stride, room);
    }
    gamma = padded(p.norm_weight, p.width, stride, room);
    beta = padded(p.norm_bias, p.width, stride, room);
    b = padded(p.bias, p.experts, p.experts, room);
    s = *padded(p.scale, 1, 1, room);
  }

  const std::int64_t stride;
  const bool tiled;
  const C *W = nullptr, *V = nullptr;
  const BFloat16* bfloat16_W = nullptr;
  // For the matrix unit: of what is multiplied along its columns, W in the forward and V in the backward, and along the experts.
  const C *dots_tiles = nullptr, *V_tiles = nullptr, *W_tiles = nullptr;
  const C *gamma, *beta, *b;
  C s;

 private:
  static constexpr bool kHaveTiles = kTiles<BFloat16> && std::is_same_v<C, float>;
};

// Every thread's operands: a copy each, which costs it less than fetching its neighbour's out of that one's cache; or one for all, where
// copies would not stay in a cache of a core's own, or add up to much.
template <typename C>
class ThreadOperands {
 public:
  ThreadOperands(const Problem& p, int threads, const Forms& forms)
      : p_(p), forms_(forms), room_(Operands<C>::room(p, forms)), own_(bytes(1) <= kOwnBytes && bytes(threads) <= kAllBytes) {
    memory_.reserve((own_ ? threads : 1) * room_);
    if (!own_) shared_.emplace(p, forms, memory_.data());
  }

  // To be called once by each thread.
  Operands<C> of(int thread) { return own_ ? Operands<C>(p_, forms_, memory_.data() + thread * room_) : *shared_; }

 private:
  static constexpr std::int64_t kOwnBytes = 1 << 20, kAllBytes = 16 << 20;

  std::int64_t bytes(int copies) const { return copies * room_ * static_cast<std::int64_t>(sizeof(C)); }

  const Problem& p_;
  const Forms forms_;
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
