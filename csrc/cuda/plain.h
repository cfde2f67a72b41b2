// The same passes for what the fast kernels do not take: widths that are no multiple of eight, addresses that are not aligned to 16 bytes,
// parameters of mixed types, long windows. One number at a time, one window a block, nothing kept on chip but gates.
#pragma once

#include "gradient.h"

namespace steer::cuda {

constexpr int kPlainExperts = 8;  // experts whose sums a thread holds
constexpr int kPlainChain = 32;   // frames added up before they join the sum of all

// A sum over the block, the same in every thread. `scratch` (warps).
STEER_DEVICE float sum_over_block(float value, float* scratch) {
  value = sum_over_warp(value);
  sync_block();
  if (thread_index() % kWarpSize == 0) scratch[thread_index() / kWarpSize] = value;
  sync_block();
  float sum = 0.0f;
  for (int w = 0; w < kWarps; ++w) sum += scratch[w];
  return sum;
}

// One window of a stream (N, D) in global memory.
struct PlainWindow {
  std::int64_t first, index;
  int frames;
};

STEER_DEVICE PlainWindow plain_window(const Plan& plan, std::int64_t index) {
  const std::int64_t clip = index / plan.clip_windows, start = index % plan.clip_windows * plan.window;
  const std::int64_t left = plan.clip_frames - start;
  return {clip * plan.clip_frames + start, index, static_cast<int>(left < plan.window ? left : plan.window)};
}

// The pool of one column, and the frame of a maximum.
template <typename S>
STEER_DEVICE float pool_column(const Problem& problem, const S* y, const PlainWindow& window, int column, int& argmax) {
  const S* from = y + window.first * problem.width + column;
  float p = widen(from[0]);
  argmax = 0;
  for (int f = 1; f < window.frames; ++f) {
    const float value = widen(from[f * problem.width]);
    if (problem.pool == Pool::kMean) {
      p += value;
    } else if (value > p || value != value) {
      p = value;
      argmax = f;
    }
  }
  return problem.pool == Pool::kMean && window.frames > 1 ? p / static_cast<float>(window.frames) : p;
}

template <typename S>
STEER_KERNEL STEER_THREADS(kThreads, kResident) steer_forward_plain_kernel(const Forward call, const Plan plan) {
  const Problem& problem = call.problem;
  const int width = static_cast<int>(problem.width), experts = static_cast<int>(problem.experts);
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  float* scratch = reinterpret_cast<float*>(shared_memory());
  float *z = scratch + kWarps, *g = z + experts;
  const float s = read_parameter(problem.scale, 0), size = static_cast<float>(width);
  const S *x = static_cast<const S*>(call.x), *r = static_cast<const S*>(call.residual);
  S* y = static_cast<S*>(call.y);
  const auto u = [&](std::int64_t at) { return r == nullptr ? widen(x[at]) : widen(x[at]) + widen(r[at]); };

  for (std::int64_t index = block_index(); index < plan.clips * plan.clip_windows; index += grid_size()) {
    const PlainWindow window = plain_window(plan, index);
    for (int f = 0; f < window.frames; ++f) {
      const std::int64_t frame = window.first + f, row = frame * width;
      for (int e = warp; e < experts; e += kWarps) {
        float sum = 0.0f;
        for (int d = lane; d < width; d += kWarpSize)
          sum = multiply_add(u(row + d), read_parameter(problem.weight, static_cast<std::int64_t>(e) * width + d), sum);
        sum = sum_over_warp(sum);
        if (lane == 0) z[e] = problem.bias.data == nullptr ? sum : sum + read_parameter(problem.bias, e);
      }
      sync_block();
      if (warp == 0)
        route(problem, 1.0f, z, g, static_cast<float*>(call.gates) + frame * experts,
              call.probs == nullptr ? nullptr : static_cast<float*>(call.probs) + frame * experts);
      sync_block();
      for (int d = thread_index(); d < width; d += kThreads) {
        float gV = 0.0f;
        for (int e = 0; e < experts; ++e)
          gV = multiply_add(g[e], read_parameter(problem.vectors, static_cast<std::int64_t>(e) * width + d), gV);
        y[row + d] = narrow<S>(multiply_add(s, gV, u(row + d)));
      }
    }
    sync_block();
    if (problem.norm == Norm::kNone) continue;
    int argmax;
    float mean = 0.0f, squares = 0.0f;
    if (problem.norm == Norm::kLayer) {
      for (int d = thread_index(); d < width; d += kThreads) mean += pool_column(problem, y, window, d, argmax);
      mean = sum_over_block(mean, scratch) / size;
    }
    for (int d = thread_index(); d < width; d += kThreads) {
      const float centred = pool_column(problem, y, window, d, argmax) - mean;
      squares = multiply_add(centred, centred, squares);
    }
    const float rstd = 1.0f / square_root(sum_over_block(squares, scratch) / size + static_cast<float>(problem.eps));
    if (thread_index() == 0) {
      float* stats = static_cast<float*>(call.stats);
      stats[index] = mean;
      stats[problem.batch * problem.pooled + index] = rstd;
    }
    for (int d = thread_index(); d < width; d += kThreads) {
      float n = (pool_column(problem, y, window, d, argmax) - mean) * rstd;
      if (problem.norm_weight.data != nullptr) n *= read_parameter(problem.norm_weight, d);
      if (problem.norm_bias.data != nullptr) n += read_parameter(problem.norm_bias, d);
      static_cast<S*>(call.normed)[index * width + d] = narrow<S>(n);
    }
    sync_block();
  }
}

// d at one frame and column of a window; adds dn xhat and dn to `dgamma` and `dbeta` at the window's first frame.
template <typename S>
STEER_DEVICE float plain_gradient(const Backward& call, const PlainWindow& window, const WindowNumbers& numbers, int f, int column,
                                  float* dgamma, float* dbeta) {
  const Problem& problem = call.problem;
  const std::int64_t at = (window.first + f) * problem.width + column;
  float d = call.dy == nullptr ? 0.0f : widen(static_cast<const S*>(call.dy)[at]);
  if (call.dnormed == nullptr) return d;
  int argmax;
  const float p = pool_column(problem, static_cast<const S*>(call.y), window, column, argmax);
  const float dn = widen(static_cast<const S*>(call.dnormed)[window.index * problem.width + column]);
  const float xhat = (p - numbers.mean) * numbers.rstd;
  const float t = problem.norm_weight.data == nullptr ? dn : dn * read_parameter(problem.norm_weight, column);
  const float dp = numbers.rstd * (t - numbers.mean_t - xhat * numbers.mean_txhat);
  if (f == 0 && dgamma != nullptr) {
    *dgamma = multiply_add(dn, xhat, *dgamma);
    *dbeta += dn;
  }
  if (problem.pool == Pool::kMean) return d + dp / static_cast<float>(window.frames);
  return problem.pool == Pool::kMax && argmax != f ? d : d + dp;
}

// du, and for plain_parameters dz, the rows' numbers and sum_e g a.
template <typename S>
STEER_KERNEL STEER_THREADS(kThreads, kResident)
    steer_backward_plain_kernel(const Backward call, const Plan plan, const Workspace workspace) {
  const Problem& problem = call.problem;
  const int width = static_cast<int>(problem.width), experts = static_cast<int>(problem.experts);
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  float* scratch = reinterpret_cast<float*>(shared_memory());
  float *a = scratch + kWarps, *dz = a + experts, *g = dz + experts;
  const float s = read_parameter(problem.scale, 0), size = static_cast<float>(width);
  const S* y = static_cast<const S*>(call.y);

  for (std::int64_t index = block_index(); index < plan.clips * plan.clip_windows; index += grid_size()) {
    const PlainWindow window = plain_window(plan, index);
    WindowNumbers numbers{0.0f, 0.0f, 0.0f, 0.0f};
    if (call.dnormed != nullptr) {
      numbers = read_stats(call, index);
      float sum_t = 0.0f, sum_txhat = 0.0f;
      for (int d = thread_index(); d < width; d += kThreads) {
        int argmax;
        const float p = pool_column(problem, y, window, d, argmax), dn = widen(static_cast<const S*>(call.dnormed)[index * width + d]);
        const float t = problem.norm_weight.data == nullptr ? dn : dn * read_parameter(problem.norm_weight, d);
        sum_t += t;
        sum_txhat = multiply_add(t, (p - numbers.mean) * numbers.rstd, sum_txhat);
      }
      numbers.mean_t = problem.norm == Norm::kLayer ? sum_over_block(sum_t, scratch) / size : 0.0f;
      numbers.mean_txhat = sum_over_block(sum_txhat, scratch) / size;
      if (workspace.row_means != nullptr && thread_index() == 0) {
        workspace.row_means[index] = numbers.mean_t;
        workspace.row_means[problem.batch * problem.pooled + index] = numbers.mean_txhat;
      }
    }
    for (int f = 0; f < window.frames; ++f) {
      const std::int64_t frame = window.first + f, place = frame * experts;
      sync_block();
      for (int e = warp; e < experts; e += kWarps) {
        float sum = 0.0f;
        for (int d = lane; d < width; d += kWarpSize)
          sum = multiply_add(plain_gradient<S>(call, window, numbers, f, d, nullptr, nullptr),
                             read_parameter(problem.vectors, static_cast<std::int64_t>(e) * width + d), sum);
        sum = sum_over_warp(sum);
        if (lane == 0) {
          a[e] = sum;
          g[e] = static_cast<const float*>(call.gates)[place + e];
        }
      }
      sync_block();
      if (warp == 0) {
        float ga_sum = 0.0f;
        route_backward(experts, s, a, g, call.dgates == nullptr ? nullptr : static_cast<const float*>(call.dgates) + place,
                       call.probs == nullptr ? nullptr : static_cast<const float*>(call.probs) + place, [&](int e, float value, float ga) {
                         dz[e] = value;
                         ga_sum += ga;
                         if (workspace.dz != nullptr) workspace.dz[place + e] = value;
                       });
        ga_sum = sum_over_warp(ga_sum);
        if (lane == 0 && workspace.ga != nullptr) workspace.ga[frame] = ga_sum;
      }
      sync_block();
      if (call.du == nullptr) continue;
      for (int d = thread_index(); d < width; d += kThreads) {
        float dzW = 0.0f;
        for (int e = 0; e < experts; ++e)
          dzW = multiply_add(dz[e], read_parameter(problem.weight, static_cast<std::int64_t>(e) * width + d), dzW);
        static_cast<S*>(call.du)[frame * width + d] = narrow<S>(plain_gradient<S>(call, window, numbers, f, d, nullptr, nullptr) + dzW);
      }
    }
    sync_block();
  }
}

// Block (x, split, z): 32 columns of the width, or of M after them, for experts 8 z .. 8 z + 7 and the split's windows.
template <typename S>
STEER_KERNEL STEER_THREADS(kThreads, kResident)
    steer_parameters_plain_kernel(const Backward call, const Plan plan, const Workspace workspace) {
  constexpr int kSums = 2 * kPlainExperts + 2;
  const Problem& problem = call.problem;
  const int width = static_cast<int>(problem.width), experts = static_cast<int>(problem.experts);
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  const int strips = (width + kWarpSize - 1) / kWarpSize, strip = block_index(), first_expert = block_index_z() * kPlainExperts;
  const bool of_gates = strip >= strips;
  const int column = (of_gates ? strip - strips : strip) * kWarpSize + lane;
  const bool inside = column < (of_gates ? experts : width);
  const std::int64_t windows = plan.clips * plan.clip_windows;
  float sums[kSums] = {};  // dW', dV', dgamma, dbeta; in the columns of M: M, -, -, -
  float part[kSums] = {};
  float dbias = 0.0f, dscale = 0.0f;

  int chain = 0;
  for (std::int64_t index = block_index_y() * kWarps + warp; index < windows; index += grid_size_y() * kWarps) {
    const PlainWindow window = plain_window(plan, index);
    WindowNumbers numbers{0.0f, 0.0f, 0.0f, 0.0f};
    if (call.dnormed != nullptr) {
      numbers = read_stats(call, index);
      numbers.mean_t = workspace.row_means[index], numbers.mean_txhat = workspace.row_means[windows + index];
    }
    for (int f = 0; f < window.frames; ++f) {
      const std::int64_t frame = window.first + f, place = frame * experts + first_expert;
      float h = 0.0f, d = 0.0f;
      if (inside && of_gates) {
        h = static_cast<const float*>(call.gates)[frame * experts + column];
      } else if (inside) {
        if (workspace.dweight != nullptr) h = widen(static_cast<const S*>(call.y)[frame * width + column]);
        d = plain_gradient<S>(call, window, numbers, f, column, part + 2 * kPlainExperts, part + 2 * kPlainExperts + 1);
      }
#pragma unroll
      for (int e = 0; e < kPlainExperts; ++e) {
        if (first_expert + e >= experts) break;
        if (workspace.dz != nullptr) part[e] = multiply_add(workspace.dz[place + e], h, part[e]);
        part[kPlainExperts + e] = multiply_add(static_cast<const float*>(call.gates)[place + e], d, part[kPlainExperts + e]);
      }
      if (strip == strips) {
        if (workspace.dbias != nullptr && lane < kPlainExperts && first_expert + lane < experts) dbias += workspace.dz[place + lane];
        if (workspace.dscale != nullptr && lane == 0) dscale += workspace.ga[frame];
      }
      if (++chain == kPlainChain) {
        chain = 0;
#pragma unroll
        for (int k = 0; k < kSums; ++k) sums[k] += part[k], part[k] = 0.0f;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < kSums; ++k) sums[k] += part[k];

  float* shared = reinterpret_cast<float*>(shared_memory());  // (warps, sums + 2, 32)
  const auto slot = [&](int w, int k, int l) { return (w * (kSums + 2) + k) * kWarpSize + l; };
#pragma unroll
  for (int k = 0; k < kSums; ++k) shared[slot(warp, k, lane)] = sums[k];
  shared[slot(warp, kSums, lane)] = dbias;
  shared[slot(warp, kSums + 1, lane)] = dscale;
  sync_block();
  const std::int64_t split = block_index_y();
  for (int k = warp; k < kSums + 2; k += kWarps) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += shared[slot(w, k, lane)];
    const int e = first_expert + k % kPlainExperts;
    const bool exists = inside && e < experts;
    const std::int64_t at = (split * experts + e) * (of_gates ? experts : width) + column;
    if (k < kPlainExperts) {
      float* partial = of_gates ? workspace.mixed : workspace.dweight;
      if (partial != nullptr && exists) partial[at] = sum;
    } else if (k < 2 * kPlainExperts) {
      if (workspace.dvectors != nullptr && exists && !of_gates) workspace.dvectors[at] = sum;
    } else if (k < kSums) {
      float* partial = k == 2 * kPlainExperts ? workspace.dgamma : workspace.dbeta;
      if (partial != nullptr && inside && !of_gates && first_expert == 0) partial[split * width + column] = sum;
    } else if (strip == strips) {
      if (k == kSums && workspace.dbias != nullptr && lane < kPlainExperts && first_expert + lane < experts)
        workspace.dbias[split * experts + first_expert + lane] = sum;
      if (k == kSums + 1 && workspace.dscale != nullptr && lane == 0 && first_expert == 0) workspace.dscale[split] = sum;
    }
  }
}

}  // namespace steer::cuda
