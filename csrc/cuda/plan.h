// How a pass is laid out on a machine: whether the fast kernels take it, how many frames a tile has, how many blocks there are, and where
// the workspace's parts lie. Plain arithmetic, the same for every launch of a problem.
#pragma once

#include <algorithm>
#include <cstdint>

#include "backward.h"
#include "forward.h"
#include "parameters.h"

namespace steer::cuda {

struct Machine {
  int multiprocessors = 0;
  std::int64_t shared_per_block = 0, shared_per_multiprocessor = 0;
};

constexpr std::int64_t kReservedShared = 1024;  // of every block, by CUDA
constexpr std::int64_t kMaxWidth = 4096;        // of the fast path

inline std::int64_t size_of(DType type) { return type == DType::kFloat64 ? 8 : type == DType::kFloat32 ? 4 : 2; }

// Frames in windows, clip by clip; without a pool all frames are one clip.
inline Plan plan_windows(const Problem& problem) {
  Plan plan;
  const bool pools = problem.pool != Pool::kNone;
  plan.clips = pools ? problem.batch : 1;
  plan.clip_frames = pools ? problem.time : problem.frames();
  plan.window = static_cast<int>(pools ? std::min(problem.pool_size, problem.time) : 1);
  plan.clip_windows = pools ? problem.pooled : plan.clip_frames;
  return plan;
}

inline bool aligned(std::initializer_list<const void*> addresses) {
  return std::all_of(addresses.begin(), addresses.end(), [](const void* a) { return reinterpret_cast<std::uintptr_t>(a) % 16 == 0; });
}

inline bool fast_parameters(const Problem& p) {
  const auto norm_takes = [](const Parameter& parameter) { return parameter.data == nullptr || parameter.dtype != DType::kFloat64; };
  return p.width % 8 == 0 && p.width <= kMaxWidth && p.weight.dtype == p.vectors.dtype &&
         (p.weight.dtype == DType::kFloat32 || p.weight.dtype == p.stream) && norm_takes(p.norm_weight) && norm_takes(p.norm_bias) &&
         plan_windows(p).window <= kRows && aligned({p.weight.data, p.vectors.data, p.norm_weight.data, p.norm_bias.data});
}

inline bool fast(const Forward& call) { return fast_parameters(call.problem) && aligned({call.x, call.residual, call.y, call.normed}); }
inline bool fast(const Backward& call) { return fast_parameters(call.problem) && aligned({call.dy, call.dnormed, call.y, call.du}); }

// Tiles of as many frames as leave room for the next tile's copies, by other blocks of the multiprocessor or by this one; of fewer where
// there would be less than one for each multiprocessor. `fixed` bytes besides the tiles; false where not even one window fits.
inline bool plan_tiles(Plan& plan, const Machine& machine, std::int64_t row_bytes, std::int64_t fixed, int most_blocks, int least_frames) {
  const std::int64_t frames = plan.clips * plan.clip_frames;
  const auto bytes = [&](int count, int stages) { return fixed + count * stages * row_bytes; };
  const auto blocks = [&](int count, int stages) {
    if (bytes(count, stages) > machine.shared_per_block) return std::int64_t{0};
    return std::min<std::int64_t>(most_blocks, machine.shared_per_multiprocessor / (bytes(count, stages) + kReservedShared));
  };
  const std::int64_t share = std::max<std::int64_t>((frames + machine.multiprocessors - 1) / machine.multiprocessors, least_frames);
  // Fewer frames leave products empty, which counts where a single block has to do all of a multiprocessor's work.
  const auto fewer = [&](int rows) { return most_blocks > 1 ? rows / 2 : rows > kRows / 2 ? rows - 4 : rows - 2; };
  for (int rows = kRows; rows >= plan.window; rows = fewer(rows)) {
    const int whole = std::max(1, static_cast<int>(std::min<std::int64_t>(rows, share)) / plan.window) * plan.window;
    plan.frames = whole;
    const std::int64_t one = blocks(whole, 1), two = blocks(whole, 2);
    if (one >= 2 && two < 2) {
      plan.stages = 1;
    } else if (two >= 1) {
      plan.stages = 2;
    } else if (one >= 1 && fewer(rows) < plan.window) {
      plan.stages = 1;
    } else {
      continue;
    }
    plan.clip_tiles = (plan.clip_frames + whole - 1) / whole;
    plan.shared_bytes = bytes(whole, plan.stages);
    return true;
  }
  return false;
}

template <typename S>
bool plan_forward(const Forward& call, const Machine& machine, Plan& plan) {
  const Problem& p = call.problem;
  plan = plan_windows(p);
  plan.stride = tile_stride<S>(static_cast<int>(p.width));
  const std::int64_t row = static_cast<std::int64_t>(plan.stride) * sizeof(S) * (call.residual == nullptr ? 1 : 2);
  return plan_tiles(plan, machine, row, 4 * ForwardShared(p).end(), kResident, 1);
}

// Whether a block can hold the sums of the parameters' gradients.
inline bool holds(const Backward& call) {
  return call.problem.experts <= kHeldExperts && call.problem.width <= kHeldSteps * kWarps * kMixStep;
}

inline bool wants_parameters(const Backward& call) {
  return call.dweight || call.dbias || call.dvectors || call.dscale || call.dnorm_weight || call.dnorm_bias;
}

template <typename S>
bool plan_backward(const Backward& call, const Machine& machine, Plan& plan) {
  const Problem& p = call.problem;
  plan = plan_windows(p);
  plan.stride = tile_stride<S>(static_cast<int>(p.width));
  const bool sums = holds(call) && wants_parameters(call);
  const bool needs_y = call.dnormed != nullptr || (sums && call.dweight != nullptr);
  const std::int64_t tiles = 1 + GradientTiles<S>(call).second + needs_y;
  const std::int64_t fixed = 4 * BackwardShared(static_cast<int>(p.experts), sums, static_cast<int>(p.width)).end();
  // With sums, a block's registers are all a multiprocessor has; and every block costs a partial, which is worth some frames.
  if (!plan_tiles(plan, machine, static_cast<std::int64_t>(plan.stride) * sizeof(S) * tiles, fixed, sums ? 1 : kResident, sums ? 4 : 1))
    return false;
  plan.blocks = static_cast<int>(std::min<std::int64_t>(plan.tiles(), machine.multiprocessors));
  return true;
}

// Whether two blocks of the parameters' kernel hold all experts' sums in a multiprocessor's registers.
inline bool few_groups(const Problem& p) { return p.experts <= 2 * kFewGroups * 8; }

template <typename S>
void plan_parameters(const Backward& call, const Machine& machine, Plan& plan) {
  const Problem& p = call.problem;
  plan = plan_windows(p);
  plan.frames = kParameterFrames / plan.window * plan.window;
  plan.clip_tiles = (plan.clip_frames + plan.frames - 1) / plan.frames;
  const int tiles = 1 + GradientTiles<S>(call).second + (call.dnormed != nullptr || call.dweight != nullptr);
  const auto bytes = [&](int stages) -> std::int64_t { return ParameterShared<S>(static_cast<int>(p.experts), tiles, stages).end(); };
  // The next tile's copies under way, where that does not cost a block.
  const int blocks = few_groups(p) ? kResident : 1;
  plan.stages = bytes(2) <= machine.shared_per_block && blocks * (bytes(2) + kReservedShared) <= machine.shared_per_multiprocessor ? 2 : 1;
  plan.shared_bytes = bytes(plan.stages);
  const std::int64_t strips = (p.width + kMixStep - 1) / kMixStep + (p.experts + kMixStep - 1) / kMixStep;
  plan.blocks = static_cast<int>(std::clamp<std::int64_t>(2 * machine.multiprocessors / strips, 1, plan.tiles()));
}

inline Plan plan_plain(const Problem& problem, const Machine& machine) {
  Plan plan = plan_windows(problem);
  plan.blocks = static_cast<int>(std::min<std::int64_t>(plan.clips * plan.clip_windows, 4 * machine.multiprocessors));
  plan.shared_bytes = 4 * (kWarps + 3 * problem.experts);
  return plan;
}

// The workspace's parts for a pass in `splits` shares of the frames, from `base` on (null: to learn the size in bytes). `again`: the
// parameters' gradients come of a kernel of their own, which needs what the first one found.
inline Workspace lay_out(const Backward& call, int splits, bool again, float* base, std::int64_t* bytes) {
  const Problem& p = call.problem;
  const std::int64_t N = p.frames(), E = p.experts, D = p.width, windows = p.batch * p.pooled;
  std::int64_t taken = 0;
  // Pointers are told apart from null, so that asking for the size takes the same turns: a workspace never starts at address 0.
  char* const start = base == nullptr ? reinterpret_cast<char*>(16) : reinterpret_cast<char*>(base);
  const auto take = [&](bool wanted, std::int64_t count) -> float* {
    if (!wanted) return nullptr;
    float* part = reinterpret_cast<float*>(start + taken);
    taken += (4 * count + 15) / 16 * 16;
    return part;
  };
  Workspace w;
  w.splits = splits;
  if (!wants_parameters(call)) {
    *bytes = 0;
    return w;
  }
  w.row_means = take(again && call.dnormed != nullptr, 2 * windows);
  w.dz = take(again && (call.dweight != nullptr || call.dbias != nullptr), N * E);
  w.ga = take(again && call.dscale != nullptr, N);
  w.dweight = take(call.dweight != nullptr, splits * E * D);
  w.mixed = take(call.dweight != nullptr, splits * E * E);
  w.dvectors = take(call.dvectors != nullptr, splits * E * D);
  w.dbias = take(call.dbias != nullptr, splits * E);
  w.dscale = take(call.dscale != nullptr, splits);
  w.dgamma = take(call.dnorm_weight != nullptr && call.dnormed != nullptr, splits * D);
  w.dbeta = take(call.dnorm_bias != nullptr && call.dnormed != nullptr, splits * D);
  *bytes = taken;
  return w;
}

}  // namespace steer::cuda
