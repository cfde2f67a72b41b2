// The parameters' gradients where a block cannot hold their sums: many experts, or a wide stream. dz and the rows' numbers are known by
// now.
//
//   dW' = dz^T y     M = dz^T g     dV' = g^T d     db = sum dz     ds = sum g a     dgamma, dbeta
//
// A block takes 64 columns of the width and its share of the frames, and holds all experts' sums: warp w has experts 8 w .. 8 w + 7, and
// where there are more than 64, the 64 from there, and so on. Behind the width's columns come those of M, whose "stream" is g.
#pragma once

#include "gradient.h"

namespace steer::cuda {

constexpr int kParameterFrames = 32;

struct ParameterShared {
  int table;

  STEER_BOTH explicit ParameterShared(int experts) : table(table_stride(round_up(experts, 8 * kWarps))) {}
  STEER_BOTH int g() const { return 0; }
  STEER_BOTH int dz() const { return g() + kParameterFrames * table; }
  STEER_BOTH int numbers() const { return dz() + kParameterFrames * table; }
  STEER_BOTH int end() const { return numbers() + 4 * kParameterFrames; }
};

template <typename S, int Groups>
STEER_KERNEL STEER_THREADS(kThreads, Groups == 1 ? kResident : 1)
    steer_parameters_kernel(const Backward call, const Plan plan, const Workspace workspace) {
  using G = GradientType<S>;
  constexpr bool kFine = std::is_same_v<S, float>;
  constexpr int kFactorParts = kFine ? 3 : 2;
  const Problem& problem = call.problem;
  const int width = static_cast<int>(problem.width), experts = static_cast<int>(problem.experts);
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  const GradientTiles<S> has(call);
  const int strips = (width + kMixStep - 1) / kMixStep, strip = block_index();
  const bool of_gates = strip >= strips;
  const int column = (of_gates ? strip - strips : strip) * kMixStep;  // of the width, or of g's experts
  const int columns = of_gates ? 0 : (width - column < kMixStep ? width - column : kMixStep);
  const bool needs_y = call.dnormed != nullptr || workspace.dweight != nullptr;

  const ParameterShared shared(experts);
  float* scratch = reinterpret_cast<float*>(shared_memory());
  float *g = scratch + shared.g(), *dz = scratch + shared.dz();
  WindowNumbers* numbers = reinterpret_cast<WindowNumbers*>(scratch + shared.numbers());
  S* tiles = reinterpret_cast<S*>(scratch + shared.end());
  const int tile_size = plan.frames * plan.stride;
  const Tile<S> first{tiles, plan.stride};
  const Tile<S> second{tiles + tile_size, plan.stride, has.second};
  const Tile<S> y{tiles + (1 + has.second) * tile_size, plan.stride};
  clear(g, 2 * kParameterFrames * shared.table);

  const auto fetch = [&](Tile<S> tile, const void* source, std::int64_t row, int rows, int spacing) {
    constexpr int kEach = 16 / sizeof(S), kPieces = kMixStep / kEach;
#pragma unroll 1
    for (int k = thread_index(); k < rows * kPieces; k += kThreads) {
      const int r = k / kPieces, c = k % kPieces * kEach;
      if (c < columns) copy_async(tile.at(r * spacing, c), static_cast<const S*>(source) + (row + r) * width + column + c);
    }
  };

  float dweight_sums[Groups][4][4], dvectors_sums[Groups][4][4], dgamma[8] = {}, dbeta[8] = {};
  float dbias_sum = 0.0f, dscale_sum = 0.0f;
#pragma unroll
  for (int k = 0; k < Groups; ++k)
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int c = 0; c < 4; ++c) dweight_sums[k][t][c] = dvectors_sums[k][t][c] = 0.0f;

  for (std::int64_t tile = block_index_y(); tile < plan.tiles(); tile += grid_size_y()) {
    const Span span = span_of(plan, tile);
    sync_block();
    if (!of_gates) {
      if (call.dy != nullptr) fetch(first, call.dy, span.first, span.frames, 1);
      if (call.dnormed != nullptr) fetch(second, call.dnormed, span.first_window, span.windows, plan.window);
      if (needs_y) fetch(y, call.y, span.first, span.frames, 1);
    }
    const std::int64_t at = span.first * experts;
    copy_table(g, shared.table, static_cast<const float*>(call.gates) + at, span.frames, kParameterFrames, experts);
    if (workspace.dz != nullptr) copy_table(dz, shared.table, workspace.dz + at, span.frames, kParameterFrames, experts);
    commit_copies();
    if (call.dnormed != nullptr && thread_index() < span.windows) {
      const std::int64_t window = span.first_window + thread_index(), windows = problem.batch * problem.pooled;
      WindowNumbers mine = read_stats(call, window);
      mine.mean_t = workspace.row_means[window], mine.mean_txhat = workspace.row_means[windows + window];
      numbers[thread_index()] = mine;
    }
    wait_for_copies<0>();
    sync_block();

    if (of_gates) {
      if (strip == strips) {
        if (workspace.dbias != nullptr && thread_index() < experts) {
          float sum = 0.0f;
          for (int row = 0; row < span.frames; ++row) sum += dz[row * shared.table + thread_index()];
          dbias_sum += sum;
        }
        if (workspace.dscale != nullptr && thread_index() < span.frames) dscale_sum += workspace.ga[span.first + thread_index()];
      }
    } else if (has.forms) {
      const int chunk = lane % 8 * 8;
      if (chunk < columns && call.dnormed != nullptr && plan.window == 1) {
        float gamma[8];
        read_parameter_chunk(problem.norm_weight, column + chunk, 1.0f, gamma);
        for (int w = warp * 4 + lane / 8; w < span.windows; w += kWarps * 4)
          form_frame_gradient(call, y, first, second, w, chunk, gamma, numbers[w], dgamma, dbeta);
      } else if (chunk < columns) {
        for (int w = warp * 4 + lane / 8; w < span.windows; w += kWarps * 4)
          form_gradient(call, y, first, second, w * plan.window, window_frames(plan, span, w), chunk, column + chunk, numbers[w], dgamma,
                        dbeta);
      }
      sync_block();
    }
    const Tile<G> d{reinterpret_cast<G*>(first.data), plan.stride};
    const Tile<G> d_rest{reinterpret_cast<G*>(second.data), plan.stride, has.second && !kFine};

    for (int from = 0; from < span.frames; from += kRows) {
      const int rows = span.frames - from;
#pragma unroll
      for (int k = 0; k < Groups; ++k) {
        const int expert = 8 * (warp + k * kWarps);
        if (expert >= experts) break;
        std::uint32_t factor[2][kFactorParts];
        if (workspace.dweight != nullptr) {
          outer_factor(dz + from * shared.table, shared.table, expert, factor);
          if (of_gates)
            outer<kFactorParts, kFactorParts>(Tile<float>{g + from * shared.table, shared.table}, rows, column, experts, factor,
                                              dweight_sums[k]);
          else
            outer<kParts<S, kFine>, kFactorParts>(Tile<S>{y.at(from, 0), y.stride}, rows, 0, columns, factor, dweight_sums[k]);
        }
        if (workspace.dvectors != nullptr && !of_gates) {
          outer_factor(g + from * shared.table, shared.table, expert, factor);
          outer<kParts<G, kFine>, kFactorParts>(Tile<G>{d.at(from, 0), d.stride}, Tile<G>{d_rest.at(from, 0), d.stride, d_rest.exists},
                                                rows, 0, columns, factor, dvectors_sums[k]);
        }
      }
    }
  }

  const std::int64_t split = block_index_y();
#pragma unroll
  for (int k = 0; k < Groups; ++k) {
    const int expert = 8 * (warp + k * kWarps);
    if (expert >= experts) break;
    if (of_gates && workspace.mixed != nullptr)
      write_outer(workspace.mixed + split * experts * experts, experts, experts, expert, column, dweight_sums[k]);
    if (!of_gates && workspace.dweight != nullptr)
      write_outer(workspace.dweight + split * experts * width, experts, width, expert, column, dweight_sums[k]);
    if (!of_gates && workspace.dvectors != nullptr)
      write_outer(workspace.dvectors + split * experts * width, experts, width, expert, column, dvectors_sums[k]);
  }
  sync_block();
  float* sums = scratch;  // (2, 8, threads)
  if (strip == strips) {
    if (workspace.dbias != nullptr && thread_index() < experts) workspace.dbias[split * experts + thread_index()] = dbias_sum;
    if (workspace.dscale != nullptr && warp == 0) {
      dscale_sum = sum_over_warp(dscale_sum);  // a tile's frames are one warp's
      if (lane == 0) workspace.dscale[split] = dscale_sum;
    }
  }
  if (!of_gates && (workspace.dgamma != nullptr || workspace.dbeta != nullptr)) {
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      sums[c * kThreads + thread_index()] = dgamma[c];
      sums[(8 + c) * kThreads + thread_index()] = dbeta[c];
    }
    sync_block();
    if (thread_index() < 2 * kMixStep) {
      const int which = thread_index() / kMixStep, mine = thread_index() % kMixStep;
      float sum = 0.0f;
      for (int group = 0; group < kThreads / 8; ++group) sum += sums[(8 * which + mine % 8) * kThreads + group * 8 + mine / 8];
      float* partial = which == 0 ? workspace.dgamma : workspace.dbeta;
      if (partial != nullptr && mine < columns) partial[split * width + column + mine] = sum;
    }
  }
}

}  // namespace steer::cuda
