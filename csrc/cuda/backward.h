// Backward of a steering pass on the GPU, in one walk over dy, dn and y. Nothing of the forward's interior was kept: the step is undone.
//
//   d as in gradient.h           a  = d V^T        ds = sum g a        dg = s a + dg_ext
//   dz = g (dg - sum_e g dg)     du = d + dz W
//   dW = dz^T u     db = sum dz                    dV = s g^T d
//
// u = y - s (g V) is not even recomputed: with M = dz^T g, an (E, E) sum, dW = dz^T y - s M V.
//
// Each block sums its own frames' share of dW, dV, ... in registers, from its first tile to its last; reduction.h adds the blocks up in
// order. Where the sums are too many for that (Steps = 0), dz stays in the workspace and parameters.h reads the streams a second time.
#pragma once

#include "gradient.h"

namespace steer::cuda {

constexpr int kHeldExperts = 8;  // experts whose sums a block holds
constexpr int kHeldSteps = 3;    // steps of the width a warp holds

struct BackwardShared {
  int a_stride, table;

  STEER_BOTH explicit BackwardShared(int experts, bool holds, int width)
      : a_stride(experts), table(table_stride(experts)), experts_(experts), sums_(holds ? 2 * width : 0) {}
  STEER_BOTH int partials() const { return 0; }
  STEER_BOTH int a() const { return partials() + kPartials; }
  STEER_BOTH int g() const { return round_up(a() + kRows * a_stride, 4); }
  STEER_BOTH int dz() const { return g() + kRows * table; }
  STEER_BOTH int numbers() const { return dz() + kRows * table; }
  STEER_BOTH int dgamma() const { return numbers() + 4 * kRows; }
  STEER_BOTH int end() const { return round_up(dgamma() + sums_, 4); }

 private:
  int experts_, sums_;
};

template <typename S, typename P, int Steps>
STEER_KERNEL STEER_THREADS(kThreads, Steps == 0 ? kResident : 1)
    steer_backward_kernel(const Backward call, const Plan plan, const Workspace workspace) {
  using G = GradientType<S>;
  constexpr bool kFine = std::is_same_v<S, float>;
  constexpr int kFactorParts = kFine ? 3 : 2;
  const Problem& problem = call.problem;
  const int width = static_cast<int>(problem.width), experts = static_cast<int>(problem.experts);
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  const int group = Steps > 0 ? kHeldExperts : group_of(experts);
  const GradientTiles<S> has(call);
  const bool needs_y = call.dnormed != nullptr || (Steps > 0 && workspace.dweight != nullptr);
  const bool routes = call.du != nullptr || workspace.dz != nullptr || workspace.ga != nullptr || workspace.dbias != nullptr ||
                      workspace.dscale != nullptr || workspace.dweight != nullptr;

  const BackwardShared shared(experts, Steps > 0, width);
  float* scratch = reinterpret_cast<float*>(shared_memory());
  float *partials = scratch + shared.partials(), *a = scratch + shared.a(), *g = scratch + shared.g(), *dz = scratch + shared.dz();
  float *dgamma_sums = scratch + shared.dgamma(), *dbeta_sums = dgamma_sums + width;
  WindowNumbers* numbers = reinterpret_cast<WindowNumbers*>(scratch + shared.numbers());
  S* tiles = reinterpret_cast<S*>(scratch + shared.end());
  const int tile_size = plan.frames * plan.stride, stage_size = (1 + has.second + needs_y) * tile_size;
  const auto tile_of = [&](int stage, int index, bool exists = true) {
    return Tile<S>{tiles + stage * stage_size + index * tile_size, plan.stride, exists};
  };
  const auto y_tile = [&](int stage) { return tile_of(stage, 1 + has.second, needs_y); };
  const auto second_tile = [&](int stage) { return tile_of(stage, 1, has.second); };

  const auto fetch = [&](std::int64_t tile, int stage) {
    if (tile < plan.tiles()) {
      const Span span = span_of(plan, tile);
      if (call.dy != nullptr) copy_rows(tile_of(stage, 0), static_cast<const S*>(call.dy) + span.first * width, span.frames, 1, width);
      if (call.dnormed != nullptr)
        copy_rows(second_tile(stage), static_cast<const S*>(call.dnormed) + span.first_window * width, span.windows, plan.window, width);
      if (needs_y) copy_rows(y_tile(stage), static_cast<const S*>(call.y) + span.first * width, span.frames, 1, width);
    }
    commit_copies();
  };

  const float s = read_parameter(problem.scale, 0);
  const P* W = static_cast<const P*>(problem.weight.data);
  const P* V = static_cast<const P*>(problem.vectors.data);
  clear(g, 2 * kRows * shared.table);  // the padding of both tables stays zero
  if (Steps > 0) clear(dgamma_sums, 2 * width);

  float dweight_sums[Steps > 0 ? Steps : 1][4][4], dvectors_sums[Steps > 0 ? Steps : 1][4][4];
  float mixed_sum = 0.0f, dbias_sum = 0.0f, dscale_sum = 0.0f;
#pragma unroll
  for (int k = 0; k < Steps; ++k)
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int c = 0; c < 4; ++c) dweight_sums[k][t][c] = dvectors_sums[k][t][c] = 0.0f;
  sync_block();

  int stage = 0;
  if (plan.stages == 2) fetch(block_index(), 0);
  for (std::int64_t tile = block_index(); tile < plan.tiles(); tile += grid_size()) {
    const Span span = span_of(plan, tile);
    const std::int64_t at = span.first * experts;
    copy_table(g, shared.table, static_cast<const float*>(call.gates) + at, span.frames, kRows, experts);
    if (call.dnormed != nullptr && plan.window == 1 && thread_index() < 2 * span.frames) {
      const int row = thread_index() / 2, which = thread_index() % 2;
      copy_word_async(which == 0 ? &numbers[row].mean : &numbers[row].rstd,
                      static_cast<const float*>(call.stats) + which * problem.batch * problem.pooled + span.first + row);
    }
    commit_copies();  // before the next tile's, which are not waited for
    fetch(plan.stages == 2 ? tile + grid_size() : tile, plan.stages == 2 ? 1 - stage : 0);
    if (plan.stages == 2)
      wait_for_copies<1>();
    else
      wait_for_copies<0>();
    sync_block();
    const Tile<S> y = y_tile(stage), first = tile_of(stage, 0), second = second_tile(stage);
    const auto in_place = [&](int row, int column, const float (&d)[8]) { write_gradient(first, second, row, column, d); };

    if (call.dnormed != nullptr && plan.window == 1) {
      frame_means(call, y, second, span.frames, partials, numbers);
      if (workspace.row_means != nullptr && thread_index() < span.frames) {
        const WindowNumbers& mine = numbers[thread_index()];
        workspace.row_means[span.first + thread_index()] = mine.mean_t;
        workspace.row_means[problem.batch * problem.pooled + span.first + thread_index()] = mine.mean_txhat;
      }
#pragma unroll 1
      for (int step = warp; step * kMixStep < width; step += kWarps) {
        const int column = step * kMixStep + lane % 8 * 8;
        float dgamma[8] = {}, dbeta[8] = {};
        if (column < width) {
          float gamma[8];
          read_parameter_chunk(problem.norm_weight, column, 1.0f, gamma);
#pragma unroll
          for (int m = 0; m < kLaneFrames; ++m) {
            const int row = lane / 8 + 4 * m;
            if (row < span.frames) form_frame_gradient(call, y, first, second, row, column, gamma, numbers[row], dgamma, dbeta, in_place);
          }
        }
        if (Steps > 0 && (workspace.dgamma != nullptr || workspace.dbeta != nullptr))
          add_to_norm_sums(dgamma, dbeta, column, width, dgamma_sums, dbeta_sums);
      }
      sync_block();
    } else if (has.forms) {
      if (call.dnormed != nullptr) {
        for (int w = warp; w < span.windows; w += kWarps) {
          const std::int64_t window = span.first_window + w;
          WindowNumbers mine = read_stats(call, window);
          const int row = w * plan.window;
          window_means(call, y.at(row, 0), y.stride, window_frames(plan, span, w), second.at(row, 0), mine);
          if (lane == 0) {
            numbers[w] = mine;
            if (workspace.row_means != nullptr) {
              workspace.row_means[window] = mine.mean_t;
              workspace.row_means[problem.batch * problem.pooled + window] = mine.mean_txhat;
            }
          }
        }
        sync_block();
      }
      for (int step = warp; step * kMixStep < width; step += kWarps) {
        const int column = step * kMixStep + lane % 8 * 8;
        float dgamma[8] = {}, dbeta[8] = {};
        if (column < width)
          for (int w = lane / 8; w < span.windows; w += 4)
            form_gradient(call, y, first, second, w * plan.window, window_frames(plan, span, w), column, column, numbers[w], dgamma, dbeta,
                          in_place);
        if (Steps > 0 && (workspace.dgamma != nullptr || workspace.dbeta != nullptr))
          add_to_norm_sums(dgamma, dbeta, column, width, dgamma_sums, dbeta_sums);
      }
      sync_block();
    }
    const Tile<G> d{reinterpret_cast<G*>(first.data), plan.stride};
    const Tile<G> d_rest{reinterpret_cast<G*>(second.data), plan.stride, has.second && !kFine};

    if (routes) {
      block_dots<BFloat16, kFine>(d, d_rest, span.frames, V, experts, width, partials, a, shared.a_stride);
      if (Steps > 0 || experts <= kWarpSize) {
#pragma unroll 1
        for (int from = warp * (kWarpSize / group); from < kRows; from += kThreads / group) {
          const int row = from + lane / group, e = lane % group;
          const bool there = row < span.frames;
          const std::int64_t place = at + static_cast<std::int64_t>(row) * experts;
          float ga;
          const float value = route_group_backward(experts, group, there, s, a + row * shared.a_stride, g + row * shared.table,
                                                   call.dgates == nullptr ? nullptr : static_cast<const float*>(call.dgates) + place,
                                                   call.probs == nullptr ? nullptr : static_cast<const float*>(call.probs) + place, ga);
          if (e < experts) dz[row * shared.table + e] = value;
          if (Steps > 0) {
            dbias_sum += value;
            dscale_sum += ga;
          } else {
            if (workspace.dz != nullptr && there && e < experts) workspace.dz[place + e] = value;
            if (workspace.ga != nullptr) {
              ga = sum_over_group(ga, group);
              if (there && e == 0) workspace.ga[span.first + row] = ga;
            }
          }
        }
      } else {
        for (int row = warp; row < kRows; row += kWarps) {
          float* mine = dz + row * shared.table;
          if (row >= span.frames) {
            for (int e = lane; e < experts; e += kWarpSize) mine[e] = 0.0f;
            continue;
          }
          const std::int64_t place = at + static_cast<std::int64_t>(row) * experts;
          float ga_sum = 0.0f;
          route_backward(experts, s, a + row * shared.a_stride, g + row * shared.table,
                         call.dgates == nullptr ? nullptr : static_cast<const float*>(call.dgates) + place,
                         call.probs == nullptr ? nullptr : static_cast<const float*>(call.probs) + place,
                         [&](int e, float value, float ga) {
                           mine[e] = value;
                           ga_sum += ga;
                           if (workspace.dz != nullptr) workspace.dz[place + e] = value;
                         });
          if (workspace.ga != nullptr) {
            ga_sum = sum_over_warp(ga_sum);
            if (lane == 0) workspace.ga[span.first + row] = ga_sum;
          }
        }
      }
      sync_block();
    }
    if (call.du != nullptr)
      mix<kFine>(
          dz, shared.table, span.frames, W, experts, width,
          [&](int column, float (&sums)[8][4]) {
            if constexpr (!kFine) {
              if (d_rest.exists) add_exactly(d_rest, span.frames, column, width, sums);
              add_exactly(d, span.frames, column, width, sums);
            }
          },
          [&](int row, int column, float (&du)[8]) {
            if constexpr (kFine) {
              const Chunk<G> chunk = read_shared_chunk(d.at(row, column));
#pragma unroll
              for (int c = 0; c < 8; ++c) du[c] += chunk.value(c);
            }
            write_chunk(static_cast<S*>(call.du) + (span.first + row) * width + column, narrow_chunk<S>(du));
          });

    if constexpr (Steps > 0) {
      std::uint32_t factor[2][kFactorParts];
      if (workspace.dweight != nullptr) {
        outer_factor(dz, shared.table, factor);
#pragma unroll
        for (int k = 0; k < Steps; ++k) {
          const int column = (warp + k * kWarps) * kMixStep;
          if (column < width) outer<kParts<S, kFine>, kFactorParts>(y, span.frames, column, width, factor, dweight_sums[k]);
        }
        const int e = thread_index() / kHeldExperts, f = thread_index() % kHeldExperts;
        if (e < kHeldExperts) {
          float sum = 0.0f;
          for (int row = 0; row < span.frames; ++row) sum = multiply_add(dz[row * shared.table + e], g[row * shared.table + f], sum);
          mixed_sum += sum;
        }
      }
      if (workspace.dvectors != nullptr) {
        outer_factor(g, shared.table, factor);
#pragma unroll
        for (int k = 0; k < Steps; ++k) {
          const int column = (warp + k * kWarps) * kMixStep;
          if (column >= width) break;
          outer<kParts<G, kFine>, kFactorParts>(d, d_rest, span.frames, column, width, factor, dvectors_sums[k]);
        }
      }
    }
    sync_block();  // before the next tile's copies land here
    if (plan.stages == 2) stage = 1 - stage;
  }
  wait_for_copies<0>();

  if constexpr (Steps > 0) {
    const std::int64_t split = block_index();
#pragma unroll
    for (int k = 0; k < Steps; ++k) {
      const int column = (warp + k * kWarps) * kMixStep;
      if (column >= width) break;
      if (workspace.dweight != nullptr) write_outer(workspace.dweight + split * experts * width, experts, width, column, dweight_sums[k]);
      if (workspace.dvectors != nullptr)
        write_outer(workspace.dvectors + split * experts * width, experts, width, column, dvectors_sums[k]);
    }
    const int e = thread_index() / kHeldExperts, f = thread_index() % kHeldExperts;
    if (workspace.mixed != nullptr && e < experts && f < experts) workspace.mixed[(split * experts + e) * experts + f] = mixed_sum;
    // An expert's sums lie with its lane of every group of every warp.
    partials[thread_index()] = dbias_sum;
    partials[kThreads + thread_index()] = dscale_sum;
    sync_block();
    if (warp == 0) {
      float dbias = 0.0f, dscale = 0.0f;
      for (int w = 0; w < kWarps; ++w) {
        dbias += partials[w * kWarpSize + lane];
        dscale += partials[kThreads + w * kWarpSize + lane];
      }
      for (int mask = group; mask < kWarpSize; mask *= 2) dbias += shuffle_xor(dbias, mask);
      dscale = sum_over_warp(dscale);
      if (workspace.dbias != nullptr && lane < experts) workspace.dbias[split * experts + lane] = dbias;
      if (workspace.dscale != nullptr && lane == 0) workspace.dscale[split] = dscale;
    }
    for (int column = thread_index(); column < width; column += kThreads) {
      if (workspace.dgamma != nullptr) workspace.dgamma[split * width + column] = dgamma_sums[column];
      if (workspace.dbeta != nullptr) workspace.dbeta[split * width + column] = dbeta_sums[column];
    }
  }
}

}  // namespace steer::cuda
