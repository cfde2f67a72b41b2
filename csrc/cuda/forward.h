// Forward of a steering pass on the GPU, in one walk over the frames: a tile of up to 16 rows comes to shared memory once, meets the
// router, the steering vectors and the norm there, and leaves once.
//
//   u = x + r    z = u W^T + b    g = route(z)    y = u + s (g V)    p = pool(y)    n = norm(p)
#pragma once

#include "products.h"
#include "routing.h"
#include "windows.h"

namespace steer::cuda {

constexpr int kRowChunks = 5;  // of eight columns, that a lane holds of a frame

// Whether a warp can hold a frame of its own in registers while it is normed. With more experts, gamma and beta beside their tables would
// cost a multiprocessor of sm_90 its second block.
STEER_BOTH bool norms_in_registers(const Problem& problem) {
  return problem.norm != Norm::kNone && problem.pool == Pool::kNone && problem.width <= kRowChunks * 8 * kWarpSize &&
         problem.experts <= kWarpSize;
}

// What a block keeps in shared memory, besides its tiles.
struct ForwardShared {
  int z_stride, g_stride;

  STEER_BOTH ForwardShared(const Problem& problem)
      : z_stride(static_cast<int>(problem.experts)),
        g_stride(table_stride(static_cast<int>(problem.experts))),
        gammas_(norms_in_registers(problem) ? 2 * static_cast<int>(problem.width) : 0) {}
  STEER_BOTH int partials() const { return 0; }
  STEER_BOTH int z() const { return partials() + kPartials; }
  STEER_BOTH int g() const { return z() + kRows * z_stride; }
  STEER_BOTH int gamma() const { return round_up(g() + kRows * g_stride, 4); }  // then beta
  STEER_BOTH int end() const { return gamma() + gammas_; }                      // floats; the tiles start on 16 bytes

 private:
  int gammas_;
};

// n = norm(p) of one window, by one warp; p is read from the tile, as it was stored, three times.
template <typename S>
STEER_DEVICE void norm_window(const Forward& call, const Plan& plan, Tile<S> y, int row, int frames, std::int64_t window) {
  const Problem& problem = call.problem;
  const int width = static_cast<int>(problem.width), lane = thread_index() % kWarpSize;
  const float size = static_cast<float>(width);
  float p[8];
  int argmax[8];
  float mean = 0.0f, squares = 0.0f;
  if (problem.norm == Norm::kLayer) {
    for (int column = 8 * lane; column < width; column += 8 * kWarpSize) {
      pool_chunk(problem.pool, y.at(row, column), y.stride, frames, p, argmax);
#pragma unroll
      for (int c = 0; c < 8; ++c) mean += p[c];
    }
    mean = sum_over_warp(mean) / size;
  }
  for (int column = 8 * lane; column < width; column += 8 * kWarpSize) {
    pool_chunk(problem.pool, y.at(row, column), y.stride, frames, p, argmax);
#pragma unroll
    for (int c = 0; c < 8; ++c) squares = multiply_add(p[c] - mean, p[c] - mean, squares);
  }
  const float rstd = 1.0f / square_root(sum_over_warp(squares) / size + static_cast<float>(problem.eps));
  if (lane == 0) {
    float* stats = static_cast<float*>(call.stats);
    stats[window] = mean;
    stats[problem.batch * problem.pooled + window] = rstd;
  }
  S* normed = static_cast<S*>(call.normed) + window * width;
  for (int column = 8 * lane; column < width; column += 8 * kWarpSize) {
    float gamma[8], beta[8];
    read_parameter_chunk(problem.norm_weight, column, 1.0f, gamma);
    read_parameter_chunk(problem.norm_bias, column, 0.0f, beta);
    pool_chunk(problem.pool, y.at(row, column), y.stride, frames, p, argmax);
#pragma unroll
    for (int c = 0; c < 8; ++c) p[c] = multiply_add((p[c] - mean) * rstd, gamma[c], beta[c]);
    write_chunk(normed + column, narrow_chunk<S>(p));
  }
}

// n = norm(y) of one frame, by one warp, which reads it once, and writes it to global memory as it passes: the mean, then the squares of
// what lies off it, from registers. `gamma` and `beta` as `copy_parameter` left them.
template <typename S>
STEER_DEVICE void norm_frame(const Forward& call, const S* y, const float* gamma, const float* beta, std::int64_t frame) {
  const Problem& problem = call.problem;
  const int width = static_cast<int>(problem.width), lane = thread_index() % kWarpSize;
  const float size = static_cast<float>(width);
  S* stored = static_cast<S*>(call.y) + frame * width;
  S* normed = static_cast<S*>(call.normed) + frame * width;
  float p[kRowChunks][8];
  float mean = 0.0f, squares = 0.0f;
#pragma unroll
  for (int k = 0; k < kRowChunks; ++k) {
    const int column = 8 * (lane + k * kWarpSize);
    const bool there = column < width;
    const Chunk<S> chunk = there ? read_shared_chunk(y + column) : zero_chunk<S>();
    if (there) write_chunk(stored + column, chunk);
#pragma unroll
    for (int c = 0; c < 8; ++c) p[k][c] = chunk.value(c);
  }
  if (problem.norm == Norm::kLayer) {
#pragma unroll
    for (int k = 0; k < kRowChunks; ++k)
#pragma unroll
      for (int c = 0; c < 8; ++c) mean += p[k][c];
    mean = sum_over_warp(mean) / size;
  }
#pragma unroll
  for (int k = 0; k < kRowChunks; ++k) {
    if (8 * k * kWarpSize >= width) break;
    const float middle = 8 * (lane + k * kWarpSize) < width ? mean : 0.0f;
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      p[k][c] -= middle;
      squares = multiply_add(p[k][c], p[k][c], squares);
    }
  }
  const float rstd = 1.0f / square_root(sum_over_warp(squares) / size + static_cast<float>(problem.eps));
  if (lane == 0) {
    float* stats = static_cast<float*>(call.stats);
    stats[frame] = mean;
    stats[problem.batch * problem.pooled + frame] = rstd;
  }
#pragma unroll
  for (int k = 0; k < kRowChunks; ++k) {
    const int column = 8 * (lane + k * kWarpSize);
    if (column >= width) break;
    float weights[8], shifts[8];
    read_copied(gamma, width, column, weights);
    read_copied(beta, width, column, shifts);
#pragma unroll
    for (int c = 0; c < 8; ++c) p[k][c] = multiply_add(p[k][c] * rstd, weights[c], shifts[c]);
    write_chunk(normed + column, narrow_chunk<S>(p[k]));
  }
}

// S: the stream's type; P: that of W and V.
template <typename S, typename P>
STEER_KERNEL STEER_THREADS(kThreads, kResident) steer_forward_kernel(const Forward call, const Plan plan) {
  using M = std::conditional_t<std::is_same_v<S, Half> && std::is_same_v<P, Half>, Half, BFloat16>;
  constexpr bool kFine = std::is_same_v<S, float>, kExactly = std::is_same_v<S, BFloat16>;
  const Problem& problem = call.problem;
  const int width = static_cast<int>(problem.width), experts = static_cast<int>(problem.experts);
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  const bool has_residual = call.residual != nullptr;

  const ForwardShared shared(problem);
  float* scratch = reinterpret_cast<float*>(shared_memory());
  float *partials = scratch + shared.partials(), *z = scratch + shared.z(), *g = scratch + shared.g();
  float *gamma = scratch + shared.gamma(), *beta = gamma + width;
  S* tiles = reinterpret_cast<S*>(scratch + shared.end());
  const int tile_size = plan.frames * plan.stride;
  const auto x_tile = [&](int stage) { return Tile<S>{tiles + stage * (has_residual ? 2 : 1) * tile_size, plan.stride}; };
  const auto r_tile = [&](int stage) { return Tile<S>{x_tile(stage).data + tile_size, plan.stride, has_residual}; };

  const auto fetch = [&](std::int64_t tile, int stage) {
    if (tile < plan.tiles()) {
      const Span span = span_of(plan, tile);
      copy_rows(x_tile(stage), static_cast<const S*>(call.x) + span.first * width, span.frames, 1, width);
      if (has_residual) copy_rows(r_tile(stage), static_cast<const S*>(call.residual) + span.first * width, span.frames, 1, width);
    }
    commit_copies();
  };

  const float s = read_parameter(problem.scale, 0);
  const int group = group_of(experts);
  const float bias = problem.bias.data != nullptr && lane % group < experts ? read_parameter(problem.bias, lane % group) : 0.0f;
  const P* W = static_cast<const P*>(problem.weight.data);
  const P* V = static_cast<const P*>(problem.vectors.data);
  for (int k = thread_index(); k < kRows * shared.g_stride; k += kThreads) g[k] = 0.0f;  // rows that no frame fills stay zero
  const bool norms = problem.norm != Norm::kNone, in_registers = norms_in_registers(problem);
  if (in_registers) {
    copy_parameter(problem.norm_weight, width, 1.0f, gamma);
    copy_parameter(problem.norm_bias, width, 0.0f, beta);
  }

  int stage = 0;
  if (plan.stages == 2) fetch(block_index(), 0);
  for (std::int64_t tile = block_index(); tile < plan.tiles(); tile += grid_size()) {
    if (plan.stages == 2) {
      fetch(tile + grid_size(), 1 - stage);
      wait_for_copies<1>();
    } else {
      fetch(tile, 0);
      wait_for_copies<0>();
    }
    sync_block();
    const Span span = span_of(plan, tile);
    const Tile<S> x = x_tile(stage), r = r_tile(stage);

    block_dots<M, true>(x, r, span.frames, W, experts, width, partials, z, shared.z_stride);

    if (experts <= kWarpSize) {
#pragma unroll 1
      for (int from = warp * (kWarpSize / group); from < span.frames; from += kThreads / group) {
        const int row = from + lane / group;
        const std::int64_t at = (span.first + row) * experts;
        route_group(problem, group, row < span.frames, bias, s, z + row * shared.z_stride, g + row * shared.g_stride,
                    static_cast<float*>(call.gates) + at, call.probs == nullptr ? nullptr : static_cast<float*>(call.probs) + at);
      }
    } else {
      for (int row = warp; row < span.frames; row += kWarps) {
        float* logits = z + row * shared.z_stride;
        if (problem.bias.data != nullptr) {
          for (int e = lane; e < experts; e += kWarpSize) logits[e] += read_parameter(problem.bias, e);
          sync_warp();
        }
        const std::int64_t at = (span.first + row) * experts;
        route(problem, s, logits, g + row * shared.g_stride, static_cast<float*>(call.gates) + at,
              call.probs == nullptr ? nullptr : static_cast<float*>(call.probs) + at);
      }
    }
    sync_block();

    // The table has s g: what is mixed has only to be added to u.
    const auto onto = [&](int column, float (&sums)[8][4]) {
      if constexpr (kExactly) {
        if (has_residual) add_exactly(r, span.frames, column, width, sums);
        add_exactly(x, span.frames, column, width, sums);
        if (norms) sync_warp();  // y may come where lanes beyond the last frame or column have read another's numbers
      }
    };
    const auto steered = [&](int row, int column, float (&y)[8]) {
      if constexpr (!kExactly) {
        const Chunk<S> mine = read_shared_chunk(x.at(row, column));
        float u[8];
#pragma unroll
        for (int c = 0; c < 8; ++c) u[c] = mine.value(c);
        if (has_residual) {
          const Chunk<S> residual = read_shared_chunk(r.at(row, column));
#pragma unroll
          for (int c = 0; c < 8; ++c) u[c] += residual.value(c);
        }
#pragma unroll
        for (int c = 0; c < 8; ++c) y[c] += u[c];
      }
      return narrow_chunk<S>(y);
    };
    // Where a norm follows, y takes x's place in the tile, rounded: the norm reads it as it is stored, for the backward has nothing else.
    if (norms)
      mix<kFine>(g, shared.g_stride, span.frames, V, experts, width, onto,
                 [&](int row, int column, float (&y)[8]) { write_shared_chunk(x.at(row, column), steered(row, column, y)); });
    else
      mix<kFine>(g, shared.g_stride, span.frames, V, experts, width, onto, [&](int row, int column, float (&y)[8]) {
        write_chunk(static_cast<S*>(call.y) + (span.first + row) * width + column, steered(row, column, y));
      });
    if (norms) sync_block();

    if (in_registers) {
      for (int row = warp; row < span.frames; row += kWarps) norm_frame(call, x.at(row, 0), gamma, beta, span.first + row);
    } else if (norms) {
      for (int row = warp; row < span.frames; row += kWarps) {
        S* y = static_cast<S*>(call.y) + (span.first + row) * width;
        for (int column = 8 * lane; column < width; column += 8 * kWarpSize) write_chunk(y + column, read_shared_chunk(x.at(row, column)));
      }
      for (int window = warp; window < span.windows; window += kWarps)
        norm_window(call, plan, x, window * plan.window, window_frames(plan, span, window), span.first_window + window);
    }
    sync_block();  // before the next tile's copies land here
    if (plan.stages == 2) stage = 1 - stage;
  }
  wait_for_copies<0>();
}

}  // namespace steer::cuda
