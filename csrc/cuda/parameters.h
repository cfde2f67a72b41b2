// The parameters' gradients where a block cannot hold their sums: many experts, or a wide stream. dz and the rows' numbers are known by
// now.
//
//   dW' = dz^T y     M = dz^T g     dV' = g^T d     db = sum dz     ds = sum g a     dgamma, dbeta
//
// A block takes 64 columns of the width and its share of the frames, and holds all experts' sums. Behind the width's columns come those of
// M, whose "stream" is g. Of a tile, everything that is multiplied is first cut into its parts, once for all warps, in the place of the
// numbers themselves; from there read_transposed takes operands as the tensor cores want them. Warp w has 16 of the columns and half of the
// experts; where there are not more than eight, half of the frames.
#pragma once

#include "gradient.h"

namespace steer::cuda {

constexpr int kParameterFrames = 32;
constexpr int kStrip = 16;                         // columns of a warp
constexpr int kFewGroups = 4;                      // of eight experts, that a warp holds the sums of
constexpr int kAllGroups = kMaxExperts / (2 * 8);  // the most there may be

// What a block keeps in shared memory, in bytes. Rows lie an odd multiple of 16 bytes apart: so eight of them meet all banks.
template <typename S>
struct ParameterShared {
  static constexpr int kPitch = kMixStep * sizeof(S) + 16;  // of a tile
  static constexpr int kPlanePitch = kMixStep * 2 + 16;     // of the parts of a tile that find no room in it
  static constexpr bool kFine = std::is_same_v<S, float>;
  static constexpr int kPlanes = kFine ? 2 : std::is_same_v<S, Half> ? 1 : 0;  // y's, and d's
  int groups, pitch, plane_pitch;  // of eight experts; of a table of them, and of third parts of it

  STEER_BOTH ParameterShared(int experts, int tiles, int stages)
      : groups((experts + 7) / 8), pitch(32 * groups + 16), plane_pitch(16 * (groups | 1)), tiles_(tiles), stages_(stages) {}
  STEER_BOTH int tile(int index) const { return index * kParameterFrames * kPitch; }
  STEER_BOTH int g() const { return tile(tiles_); }
  STEER_BOTH int dz() const { return g() + kParameterFrames * pitch; }
  STEER_BOTH int numbers() const { return dz() + kParameterFrames * pitch; }
  STEER_BOTH int stage() const { return numbers() + kParameterFrames * 16; }
  // Behind the stages.
  STEER_BOTH int plane(int index) const { return stages_ * stage() + index * kParameterFrames * kPlanePitch; }
  STEER_BOTH int g_third() const { return plane(kPlanes); }
  STEER_BOTH int dz_third() const { return g_third() + (kFine ? kParameterFrames * plane_pitch : 0); }
  STEER_BOTH int gamma() const { return dz_third() + (kFine ? kParameterFrames * plane_pitch : 0); }
  STEER_BOTH int end() const { return gamma() + kMixStep * 4; }

 private:
  int tiles_, stages_;
};

// Eight float32 numbers as bfloat16 parts: two in the place of the numbers, a third to `third`.
template <int Parts>
STEER_DEVICE void write_parts(const Chunk<float>& chunk, char* place, char* third) {
  std::uint32_t parts[Parts][4];
  neighbours<Parts>(chunk, parts);
#pragma unroll
  for (int p = 0; p < Parts; ++p)
    write_shared(reinterpret_cast<Words*>(p < 2 ? place + 16 * p : third), {{parts[p][0], parts[p][1], parts[p][2], parts[p][3]}});
}

// sums [k][4] += h^T c over 16 frames: columns i (c < 2) and i + 8, experts 8 k + 2 q + c % 2, for k < Count from `From` on: so many
// together, for a product takes long to come out. `a`: the columns' parts. A table has two parts of eight experts side by side, and `third`
// the third; both are the lane's own addresses.
template <int Count, int From, int A, int B, int Groups>
STEER_DEVICE void outer_together(const Words (&a)[A], const char* table, const char* third, float (&sums)[Groups][4]) {
  Words two[Count], last[Count];
  float sum[Count][4] = {};
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    two[k] = read_transposed(table + 32 * (From + k));
    if constexpr (B == 3) last[k] = read_transposed(third + 16 * (From + k));
  }
#pragma unroll
  for (int order = A + B - 2; order >= 0; --order)
#pragma unroll
    for (int p = 0; p < A; ++p) {
      const int r = order - p;
      if (r < 0 || r >= B || !kept<A, B>(p, r)) continue;
#pragma unroll
      for (int k = 0; k < Count; ++k) {
        const Words& b = r < 2 ? two[k] : last[k];
        mma<BFloat16>(sum[k], a[p].at[0], a[p].at[1], a[p].at[2], a[p].at[3], b.at[2 * (r % 2)], b.at[2 * (r % 2) + 1]);
      }
    }
#pragma unroll
  for (int k = 0; k < Count; ++k)
#pragma unroll
    for (int c = 0; c < 4; ++c) sums[From + k][c] += sum[k][c];
}

// The same for k < `count`.
template <int A, int B, int From = 0, int Groups>
STEER_DEVICE void outer_parts(const Words (&a)[A], const char* table, const char* third, int count, float (&sums)[Groups][4]) {
  if (count >= From + 4) {
    outer_together<4, From, A, B>(a, table, third, sums);
    if constexpr (From + 4 < Groups) outer_parts<A, B, From + 4>(a, table, third, count, sums);
  } else if (count == From + 3) {
    outer_together<3, From, A, B>(a, table, third, sums);
  } else if (count == From + 2) {
    outer_together<2, From, A, B>(a, table, third, sums);
  } else if (count == From + 1) {
    outer_together<1, From, A, B>(a, table, third, sums);
  }
}
// `h`: the lane's own addresses of the columns' parts.
template <int A, int B, int Groups>
STEER_DEVICE void outer_parts(const char* const (&h)[A], const char* table, const char* third, int count, float (&sums)[Groups][4]) {
  Words a[A];
#pragma unroll
  for (int p = 0; p < A; ++p) a[p] = read_transposed(h[p]);
  outer_parts<A, B>(a, table, third, count, sums);
}

// Such sums of eight experts to a partial (E, columns).
STEER_DEVICE void write_sums(float* partial, int experts, int width, int expert, int column, const float (&sums)[4]) {
  const int i = thread_index() % kWarpSize / 4, q = thread_index() % 4;
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const int e = expert + 2 * q + c % 2, at = column + i + 8 * (c / 2);
    if (e < experts && at < width) partial[static_cast<std::int64_t>(e) * width + at] = sums[c];
  }
}

template <typename S, int Groups>
STEER_KERNEL STEER_THREADS(kThreads, Groups <= kFewGroups ? kResident : 1)
    steer_parameters_kernel(const Backward call, const Plan plan, const Workspace workspace) {
  using Shared = ParameterShared<S>;
  constexpr bool kFine = std::is_same_v<S, float>;
  constexpr int kFactorParts = kFine ? 3 : 2, kStreamParts = kParts<S, kFine>;
  const Problem& problem = call.problem;
  const int width = static_cast<int>(problem.width), experts = static_cast<int>(problem.experts);
  const unsigned thread = static_cast<unsigned>(thread_index());  // what is divided of it needs no care for signs, nor registers for that
  const int warp = thread / kWarpSize, lane = thread % kWarpSize;
  const GradientTiles<S> has(call);
  const int strips = (width + kMixStep - 1) / kMixStep, strip = block_index();
  const bool of_gates = strip >= strips;
  const int column = (of_gates ? strip - strips : strip) * kMixStep;  // of the width, or of g's experts
  const int left = (of_gates ? experts : width) - column, columns = left < kMixStep ? left : kMixStep;
  const bool needs_y = call.dnormed != nullptr || workspace.dweight != nullptr;

  const Shared shared(experts, 1 + has.second + needs_y, plan.stages);
  char* const memory = shared_memory();
  float* gamma_strip = reinterpret_cast<float*>(memory + shared.gamma());
  const auto tile_of = [&](int stage, int index, bool exists = true) {
    return Tile<S>{reinterpret_cast<S*>(memory + stage * shared.stage() + shared.tile(index)), Shared::kPitch / static_cast<int>(sizeof(S)),
                   exists};
  };
  if (!of_gates && thread_index() < kMixStep / 8) {
    float gamma[8] = {};
    if (8 * thread_index() < columns) read_parameter_chunk(problem.norm_weight, column + 8 * thread_index(), 1.0f, gamma);
    write_chunk(gamma_strip + 8 * thread_index(), narrow_chunk<float>(gamma));
  }

  constexpr int kEach = 16 / sizeof(S), kPieces = kMixStep / kEach, kTableLanes = 16;
  const int piece = thread % kPieces * kEach, piece_row = thread / kPieces;
  const int stream_offset = piece_row * width + column + piece;
  const int table_row = thread / kTableLanes, table_lane = thread % kTableLanes;
  const bool fours = experts % 4 == 0 && reinterpret_cast<std::uintptr_t>(call.gates) % 16 == 0;
  const auto fetch = [&](std::int64_t tile, int stage) {
    if (tile >= plan.tiles()) return;
    const Span span = span_of(plan, tile);
    char* const base = memory + stage * shared.stage();
    if (!of_gates) {
      const Tile<S> first = tile_of(stage, 0), second = tile_of(stage, 1), y = tile_of(stage, 1 + has.second);
      const std::int64_t from = span.first * width + stream_offset, from_window = span.first_window * width + stream_offset;
#pragma unroll
      for (int more = 0; more < kParameterFrames; more += kThreads / kPieces) {
        const int r = piece_row + more;
        if (r >= span.frames || piece >= columns) break;
        const int further = more * width;
        if (call.dy != nullptr) copy_async(first.at(r, piece), static_cast<const S*>(call.dy) + from + further);
        if (needs_y) copy_async(y.at(r, piece), static_cast<const S*>(call.y) + from + further);
        if (call.dnormed != nullptr && r < span.windows)
          copy_async(second.at(r * plan.window, piece), static_cast<const S*>(call.dnormed) + from_window + further);
      }
      if (call.dnormed != nullptr && thread_index() < 4 * span.windows) {
        const int which = thread % 4, w = thread / 4;
        const std::int64_t windows = problem.batch * problem.pooled;
        const float* source =
            which < 2 ? static_cast<const float*>(call.stats) + which * windows : workspace.row_means + (which - 2) * windows;
        copy_word_async(base + shared.numbers() + 4 * thread_index(), source + span.first_window + w);
      }
    }
    // The tables' rows, which dz has besides g where anybody needs it.
    const auto copy_tables = [&](auto copy, int each) {
#pragma unroll 1
      for (int e = each * table_lane; e < experts; e += each * kTableLanes) {
        const std::int64_t from = (span.first + table_row) * experts + e;
        char* const to = base + shared.g() + table_row * shared.pitch + 4 * e;
#pragma unroll
        for (int more = 0; more < kParameterFrames; more += kThreads / kTableLanes) {
          if (table_row + more >= span.frames) break;
          copy(to + more * shared.pitch, static_cast<const float*>(call.gates) + from + more * experts);
          if (workspace.dz != nullptr) copy(to + (kParameterFrames + more) * shared.pitch, workspace.dz + from + more * experts);
        }
      }
    };
    if (fours)
      copy_tables([](char* to, const float* from) { copy_async(to, from); }, 4);
    else
      copy_tables([](char* to, const float* from) { copy_word_async(to, from); }, 1);
  };

  // This warp's columns, and groups of experts or frames. All warps take the same turns, also where the last of the columns or groups do
  // not exist: so the compiler knows that a warp's lanes stay together, and nobody writes those sums.
  const int mine = warp % (kMixStep / kStrip) * kStrip, half = warp / (kMixStep / kStrip);
  const bool alone = shared.groups == 1;
  const int group_count = (shared.groups + 1) / 2, first_group = half * (shared.groups / 2);
  // As read_transposed takes rows and columns: the stream's come as the first operand's, a table's as the second's.
  const int lane_row = lane % 8 + 8 * (lane / 16), side = lane / 8 % 2, factor_row = lane % 16, factor_part = lane / 16;

  float dweight_sums[Groups][4], dvectors_sums[Groups][4], dgamma[8] = {}, dbeta[8] = {};
  float &dbias_sum = dgamma[0], &dscale_sum = dbeta[0];  // the strips of M have no columns of a norm, and registers are short
#pragma unroll
  for (int k = 0; k < Groups; ++k)
#pragma unroll
    for (int c = 0; c < 4; ++c) dweight_sums[k][c] = dvectors_sums[k][c] = 0.0f;

  int stage = 0;
  if (plan.stages == 2) fetch(block_index_y(), 0);
  for (std::int64_t tile = block_index_y(); tile < plan.tiles(); tile += grid_size_y()) {
    if (plan.stages == 1) {
      sync_block();
      fetch(tile, 0);
    }
    commit_copies();
    wait_for_copies<0>();
    sync_block();  // everyone is done with the tile before, too, in whose place the next one comes
    if (plan.stages == 2) fetch(tile + grid_size_y(), 1 - stage);
    const Span span = span_of(plan, tile);
    char* const base = memory + stage * shared.stage();
    const Tile<S> first = tile_of(stage, 0), second = tile_of(stage, 1, has.second), y = tile_of(stage, 1 + has.second);
    char *const g = base + shared.g(), *const dz = base + shared.dz();

    if (of_gates) {
      if (strip == strips) {
        if (workspace.dbias != nullptr && thread_index() < experts) {
          float sum = 0.0f;
          for (int row = 0; row < span.frames; ++row) sum += reinterpret_cast<const float*>(dz + row * shared.pitch)[thread_index()];
          dbias_sum += sum;
        }
        if (workspace.dscale != nullptr && thread_index() < span.frames) dscale_sum += workspace.ga[span.first + thread_index()];
        sync_block();
      }
    } else {
      const WindowNumbers* numbers = reinterpret_cast<const WindowNumbers*>(base + shared.numbers());
      const int at = lane % 8 * 8;
      const auto plane = [&](int index, int row) { return memory + shared.plane(index) + row * Shared::kPlanePitch + 2 * at; };
      const auto emit = [&](int row, int, const float (&d)[8]) {
        if constexpr (kFine)
          write_parts<3>(narrow_chunk<float>(d), reinterpret_cast<char*>(first.at(row, at)), plane(1, row));
        else
          write_gradient(first, second, row, at, d);
      };
      if (at < columns)
#pragma unroll 1
        for (int w = warp * 4 + lane / 8; w < span.windows; w += kWarps * 4) {
          const int row = w * plan.window, frames = window_frames(plan, span, w);
          if (call.dnormed != nullptr && plan.window == 1) {
            float gamma[8];
            const Chunk<float> copied = read_shared_chunk(gamma_strip + at);
#pragma unroll
            for (int c = 0; c < 8; ++c) gamma[c] = copied.value(c);
            form_frame_gradient(call, y, first, second, row, at, gamma, numbers[w], dgamma, dbeta, emit);
          } else if (has.forms || kFine) {
            form_gradient(call, y, first, second, row, frames, at, column + at, numbers[w], dgamma, dbeta, emit);
          }
        }
      if (kStreamParts > 1 && workspace.dweight != nullptr) {
        if (plan.window > 1) sync_block();  // others pool these frames
#pragma unroll 1
        for (int row = warp * 4 + lane / 8; row < span.frames && at < columns; row += kWarps * 4) {
          const Chunk<S> chunk = read_shared_chunk(y.at(row, at));
          char* const place = reinterpret_cast<char*>(y.at(row, at));
          if constexpr (kFine) {
            write_parts<3>(chunk, place, plane(0, row));
          } else if constexpr (kStreamParts == 2) {
            std::uint32_t parts[2][4];
            neighbours<2>(chunk, parts);
            write_shared(reinterpret_cast<Words*>(place), {{parts[0][0], parts[0][1], parts[0][2], parts[0][3]}});
            write_shared(reinterpret_cast<Words*>(plane(0, row)), {{parts[1][0], parts[1][1], parts[1][2], parts[1][3]}});
          }
        }
      }
    }
    {
      // Half of a warp has g, half dz, two rows each. Rows beyond the last frame become zero.
      const bool of_dz = lane / 16;
      char* const third = memory + (of_dz ? shared.dz_third() : shared.g_third());
      if (!of_dz || workspace.dz != nullptr)
#pragma unroll 1
        for (int group = lane % 8; group < shared.groups; group += 8)
#pragma unroll
          for (int row = 0; row < kParameterFrames; row += 2 * kWarps) {
            const int here = row + 2 * warp + lane / 8 % 2;
            char* const place = (of_dz ? dz : g) + here * shared.pitch + 32 * group;
            const Chunk<float> chunk = here < span.frames ? read_shared_chunk(reinterpret_cast<const float*>(place)) : zero_chunk<float>();
            write_parts<kFactorParts>(chunk, place, third + here * shared.plane_pitch + 16 * group);
          }
    }
    sync_block();

#pragma unroll 1
    for (int step = 0; step < (alone ? 1 : kParameterFrames / kRows); ++step) {
      const int in_tile = lane_row + kRows * (alone ? half : step), in_factor = factor_row + kRows * (alone ? half : step);
      // Frames beyond the last are read as the last: they meet zeros in the tables.
      const int row = in_tile < span.frames ? in_tile : span.frames - 1;
      const int in_table = in_factor * shared.pitch + 32 * first_group + 16 * factor_part;
      const int in_third = in_factor * shared.plane_pitch + 16 * first_group;
      const int chunk = mine / 8 + side, in_plane = row * Shared::kPlanePitch + 16 * chunk;
      const auto place = [&](const Tile<S>& tile) { return reinterpret_cast<const char*>(tile.at(row, 8 * chunk)); };
      const auto plane = [&](int index) { return memory + shared.plane(index) + in_plane; };
      if (workspace.dweight != nullptr) {
        const char *const factor = dz + in_table, *const third = memory + shared.dz_third() + in_third;
        if (of_gates) {
          const char* const own = g + in_tile * shared.pitch + 32 * (column / 8 + chunk);
          if constexpr (kFine) {
            const char* const own_third = memory + shared.g_third() + in_tile * shared.plane_pitch + 16 * (column / 8 + chunk);
            outer_parts<3, 3>({own, own + 16, own_third}, factor, third, group_count, dweight_sums);
          } else {
            outer_parts<2, 2>({own, own + 16}, factor, third, group_count, dweight_sums);
          }
        } else if constexpr (kFine) {
          outer_parts<3, 3>({place(y), place(y) + 16, plane(0)}, factor, third, group_count, dweight_sums);
        } else if constexpr (kStreamParts == 2) {
          outer_parts<2, 2>({place(y), plane(0)}, factor, third, group_count, dweight_sums);
        } else {
          outer_parts<1, 2>({place(y)}, factor, third, group_count, dweight_sums);
        }
      }
      if (workspace.dvectors != nullptr && !of_gates) {
        const char *const factor = g + in_table, *const third = memory + shared.g_third() + in_third;
        if constexpr (kFine)
          outer_parts<3, 3>({place(first), place(first) + 16, plane(1)}, factor, third, group_count, dvectors_sums);
        else if (has.second)
          outer_parts<2, 2>({place(first), place(second)}, factor, third, group_count, dvectors_sums);
        else
          outer_parts<1, 2>({place(first)}, factor, third, group_count, dvectors_sums);
      }
    }
    if (plan.stages == 2) stage = 1 - stage;
  }

  if (alone) {  // the second half's frames to the first half's
    float* const sums = reinterpret_cast<float*>(memory) + thread_index() % (kThreads / 2);
    sync_block();
#pragma unroll
    for (int c = 0; c < 8; ++c)
      if (half == 1) sums[c * kThreads / 2] = c < 4 ? dweight_sums[0][c] : dvectors_sums[0][c - 4];
    sync_block();
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (half == 0) dweight_sums[0][c] += sums[c * kThreads / 2], dvectors_sums[0][c] += sums[(4 + c) * kThreads / 2];
  }
  const std::int64_t split = block_index_y();
#pragma unroll
  for (int k = 0; k < Groups; ++k) {
    if (k >= group_count || (alone && half == 1)) break;
    const int expert = 8 * (first_group + k), at = column + mine;
    if (of_gates && workspace.mixed != nullptr)
      write_sums(workspace.mixed + split * experts * experts, experts, experts, expert, at, dweight_sums[k]);
    if (!of_gates && workspace.dweight != nullptr)
      write_sums(workspace.dweight + split * experts * width, experts, width, expert, at, dweight_sums[k]);
    if (!of_gates && workspace.dvectors != nullptr)
      write_sums(workspace.dvectors + split * experts * width, experts, width, expert, at, dvectors_sums[k]);
  }
  if (strip == strips) {
    if (workspace.dbias != nullptr && thread_index() < experts) workspace.dbias[split * experts + thread_index()] = dbias_sum;
    if (workspace.dscale != nullptr && warp == 0) {
      dscale_sum = sum_over_warp(dscale_sum);  // a tile's frames are one warp's
      if (lane == 0) workspace.dscale[split] = dscale_sum;
    }
  }
  if (!of_gates && (workspace.dgamma != nullptr || workspace.dbeta != nullptr)) {
    float* sums = reinterpret_cast<float*>(memory);  // (2, warps, 64): four lanes of a warp have a share of a column
    sync_block();
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      float gamma = dgamma[c] + shuffle_xor(dgamma[c], 8), beta = dbeta[c] + shuffle_xor(dbeta[c], 8);
      gamma += shuffle_xor(gamma, 16), beta += shuffle_xor(beta, 16);
      if (lane < 8) sums[warp * kMixStep + 8 * lane + c] = gamma, sums[(kWarps + warp) * kMixStep + 8 * lane + c] = beta;
    }
    sync_block();
    if (thread_index() < 2 * kMixStep) {
      const int which = thread_index() / kMixStep, at = thread_index() % kMixStep;
      float sum = 0.0f;
      for (int w = 0; w < kWarps; ++w) sum += sums[(which * kWarps + w) * kMixStep + at];
      float* partial = which == 0 ? workspace.dgamma : workspace.dbeta;
      if (partial != nullptr && at < columns) partial[split * width + column + at] = sum;
    }
  }
}

}  // namespace steer::cuda
