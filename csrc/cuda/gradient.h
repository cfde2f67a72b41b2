// The gradient at y of a tile, d = dy + unpool(dp), in shared memory; and the workspace of a backward pass.
//
//   xhat = (p - mean) rstd       t = dn gamma       p = pool(y)
//   dp = rstd (t - mean(t) - xhat mean(t xhat))     d = dy + unpool(dp)
//
// d takes the place of dy, and where it has more digits than the stream, of dn: as two bfloat16 parts of 16 bits together, which the tensor
// cores multiply as they are. A window's row of dn comes to the row of its first frame, so that whoever forms the window's d overwrites
// nothing that others still read.
#pragma once

#include "products.h"
#include "routing.h"
#include "windows.h"

namespace steer::cuda {

// Results of one kernel that the next one reads, in memory of the caller; null where nobody needs them.
struct Workspace {
  float* row_means = nullptr;  // (2, B, P): mean(t), mean(t xhat)
  float* dz = nullptr;         // (N, E)
  float* ga = nullptr;         // (N): sum_e g a
  // One partial sum a split of the frames.
  float* dweight = nullptr;   // (splits, E, D): dz^T y
  float* mixed = nullptr;     // (splits, E, E): M = dz^T g
  float* dvectors = nullptr;  // (splits, E, D): g^T d
  float* dbias = nullptr;     // (splits, E)
  float* dscale = nullptr;    // (splits)
  float* dgamma = nullptr;    // (splits, D)
  float* dbeta = nullptr;     // (splits, D)
  int splits = 0;
};

// How d lies in shared memory: float32 for a float32 stream, else bfloat16 parts.
template <typename S>
using GradientType = std::conditional_t<std::is_same_v<S, float>, float, BFloat16>;

// Which tiles a backward pass keeps. Without a norm, the dy of a bfloat16 or float32 stream is d, as it came.
template <typename S>
struct GradientTiles {
  bool forms, second;

  STEER_BOTH explicit GradientTiles(const Backward& call)
      : forms(call.dnormed != nullptr || call.dy == nullptr || std::is_same_v<S, Half>),
        second(call.dnormed != nullptr || std::is_same_v<S, Half>) {}
};

// One window's numbers.
struct WindowNumbers {
  float mean, rstd, mean_t, mean_txhat;
};

STEER_DEVICE WindowNumbers read_stats(const Backward& call, std::int64_t window) {
  const float* stats = static_cast<const float*>(call.stats);
  return {stats[window], stats[call.problem.batch * call.problem.pooled + window], 0.0f, 0.0f};
}

// mean(t) and mean(t xhat) of one window, by one warp; `dn` is the row of dn in shared memory.
template <typename S>
STEER_DEVICE void window_means(const Backward& call, const S* y, int stride, int frames, const S* dn, WindowNumbers& numbers) {
  const int width = static_cast<int>(call.problem.width), lane = thread_index() % kWarpSize;
  float sum_t = 0.0f, sum_txhat = 0.0f;
  for (int column = 8 * lane; column < width; column += 8 * kWarpSize) {
    float p[8], gamma[8];
    int argmax[8];
    pool_chunk(call.problem.pool, y + column, stride, frames, p, argmax);
    read_parameter_chunk(call.problem.norm_weight, column, 1.0f, gamma);
    const Chunk<S> incoming = read_shared_chunk(dn + column);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const float t = incoming.value(c) * gamma[c];
      sum_t += t;
      sum_txhat = multiply_add(t, (p[c] - numbers.mean) * numbers.rstd, sum_txhat);
    }
  }
  sum_t = sum_over_warp(sum_t), sum_txhat = sum_over_warp(sum_txhat);
  const float size = static_cast<float>(width);
  numbers.mean_t = call.problem.norm == Norm::kLayer ? sum_t / size : 0.0f;
  numbers.mean_txhat = sum_txhat / size;
}

// Eight columns of d to a tile, in parts where it has more digits than the stream.
template <typename S>
STEER_DEVICE void write_gradient(Tile<S> first, Tile<S> second, int row, int at, const float (&d)[8]) {
  if constexpr (std::is_same_v<S, float>) {
    write_shared_chunk(first.at(row, at), narrow_chunk<float>(d));
  } else {
    std::uint32_t parts[2][4];
    neighbours<2>(narrow_chunk<float>(d), parts);
    write_shared(reinterpret_cast<Words*>(first.at(row, at)), {{parts[0][0], parts[0][1], parts[0][2], parts[0][3]}});
    if (second.exists) write_shared(reinterpret_cast<Words*>(second.at(row, at)), {{parts[1][0], parts[1][1], parts[1][2], parts[1][3]}});
  }
}

// d of one window and eight columns, a frame at a time to `emit(row, at, d)`, which may write over what `first` and `second` have there.
// `column` counts in the stream, `at` in the tiles. Adds to dgamma and dbeta (8).
template <typename S, typename Emit>
STEER_DEVICE void form_gradient(const Backward& call, Tile<S> y, Tile<S> first, Tile<S> second, int row, int frames, int at, int column,
                                const WindowNumbers& numbers, float (&dgamma)[8], float (&dbeta)[8], Emit emit) {
  float dp[8];
  int argmax[8];
#pragma unroll
  for (int c = 0; c < 8; ++c) dp[c] = 0.0f, argmax[c] = 0;
  if (call.dnormed != nullptr) {
    float p[8], gamma[8];
    pool_chunk(call.problem.pool, y.at(row, at), y.stride, frames, p, argmax);
    read_parameter_chunk(call.problem.norm_weight, column, 1.0f, gamma);
    const Chunk<S> incoming = read_shared_chunk(second.at(row, at));
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const float dn = incoming.value(c), xhat = (p[c] - numbers.mean) * numbers.rstd;
      dgamma[c] = multiply_add(dn, xhat, dgamma[c]);
      dbeta[c] += dn;
      dp[c] = numbers.rstd * (dn * gamma[c] - numbers.mean_t - xhat * numbers.mean_txhat);
      if (call.problem.pool == Pool::kMean) dp[c] /= static_cast<float>(frames);
    }
  }
  const bool to_the_largest = call.problem.pool == Pool::kMax;
  for (int f = 0; f < frames; ++f) {
    float d[8];
    const Chunk<S> dy = call.dy != nullptr ? read_shared_chunk(first.at(row + f, at)) : zero_chunk<S>();
#pragma unroll
    for (int c = 0; c < 8; ++c) d[c] = dy.value(c) + (to_the_largest && argmax[c] != f ? 0.0f : dp[c]);
    emit(row + f, at, d);
  }
}

// xhat of eight numbers of a frame. In one step where the stream is short: what the product of mean and rstd loses is as small beside the
// stream's own rounding as what the mean has lost before.
template <typename S>
STEER_DEVICE void normalise(const Chunk<S>& y, const WindowNumbers& numbers, float (&xhat)[8]) {
  const float shift = -numbers.mean * numbers.rstd;
#pragma unroll
  for (int c = 0; c < 8; ++c)
    xhat[c] = std::is_same_v<S, float> ? (y.value(c) - numbers.mean) * numbers.rstd : multiply_add(y.value(c), numbers.rstd, shift);
}

// Without a pool a window is a frame. A lane has eight columns of frames lane / 8 + 4 m, so that gamma is read once for four frames, and
// nothing has to be pooled: first the frames' means, by the block, then d.
constexpr int kLaneFrames = kRows / 4;

// mean(t) and mean(t xhat) of a tile's frames, to `numbers`, which has the rest of them. `partials` (warps, 16, 2) is scratch. Ends with a
// barrier.
template <typename S>
STEER_DEVICE void frame_means(const Backward& call, Tile<S> y, Tile<S> dn, int frames, float* partials, WindowNumbers* numbers) {
  const int width = static_cast<int>(call.problem.width), warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  constexpr bool kShort = !std::is_same_v<S, float>;  // as in `normalise`: the mean is taken off the sum
  float sums[2][kLaneFrames] = {};                    // t, and t (y - mean) or t y
#pragma unroll 1
  for (int column = warp * kMixStep + lane % 8 * 8; column < width; column += kWarps * kMixStep) {
    float gamma[8];
    read_parameter_chunk(call.problem.norm_weight, column, 1.0f, gamma);
#pragma unroll
    for (int m = 0; m < kLaneFrames; ++m) {
      const int row = lane / 8 + 4 * m;
      if (row >= frames) break;
      const Chunk<S> mine = read_shared_chunk(y.at(row, column)), incoming = read_shared_chunk(dn.at(row, column));
      const float mean = kShort ? 0.0f : numbers[row].mean;
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const float t = incoming.value(c) * gamma[c];
        sums[0][m] += t;
        sums[1][m] = multiply_add(t, kShort ? mine.value(c) : mine.value(c) - mean, sums[1][m]);
      }
    }
  }
#pragma unroll
  for (int m = 0; m < kLaneFrames; ++m) {
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const float sum = sum_over_group(sums[which][m], 8);
      if (lane % 8 == 0) partials[(warp * kRows + lane / 8 + 4 * m) * 2 + which] = sum;
    }
  }
  sync_block();
  if (thread_index() < frames) {
    WindowNumbers& mine = numbers[thread_index()];
    float t = 0.0f, ty = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float* partial = partials + (w * kRows + thread_index()) * 2;
      t += partial[0], ty += partial[1];
    }
    const float size = static_cast<float>(width);
    mine.mean_t = call.problem.norm == Norm::kLayer ? t / size : 0.0f;
    mine.mean_txhat = (kShort ? multiply_add(-mine.mean, t, ty) : ty) * mine.rstd / size;
  }
  sync_block();
}

// d of one frame and eight columns, as `form_gradient`.
template <typename S, typename Emit>
STEER_DEVICE void form_frame_gradient(const Backward& call, Tile<S> y, Tile<S> first, Tile<S> second, int row, int at,
                                      const float (&gamma)[8], const WindowNumbers& numbers, float (&dgamma)[8], float (&dbeta)[8],
                                      Emit emit) {
  float xhat[8], d[8];
  normalise(read_shared_chunk(y.at(row, at)), numbers, xhat);
  const Chunk<S> incoming = read_shared_chunk(second.at(row, at));
  const Chunk<S> dy = call.dy != nullptr ? read_shared_chunk(first.at(row, at)) : zero_chunk<S>();
#pragma unroll
  for (int c = 0; c < 8; ++c) {
    const float dn = incoming.value(c);
    dgamma[c] = multiply_add(dn, xhat[c], dgamma[c]);
    dbeta[c] += dn;
    const float off = multiply_add(-numbers.mean_txhat, xhat[c], multiply_add(dn, gamma[c], -numbers.mean_t));
    d[c] = multiply_add(numbers.rstd, off, dy.value(c));
  }
  emit(row, at, d);
}

// Adds the dgamma and dbeta of a step's 64 columns, which four lanes have a share of, to their sums in shared memory: each of the four adds
// up a quarter of the sixteen numbers.
STEER_DEVICE void add_to_norm_sums(const float (&dgamma)[8], const float (&dbeta)[8], int column, int width, float* dgamma_sums,
                                   float* dbeta_sums) {
  const int lane = thread_index() % kWarpSize;
  const bool beta = lane & 8, upper = lane & 16;
  float eight[8], four[4];
#pragma unroll
  for (int c = 0; c < 8; ++c) eight[c] = (beta ? dbeta[c] : dgamma[c]) + shuffle_xor(beta ? dgamma[c] : dbeta[c], 8);
#pragma unroll
  for (int c = 0; c < 4; ++c) four[c] = (upper ? eight[c + 4] : eight[c]) + shuffle_xor(upper ? eight[c] : eight[c + 4], 16);
  if (column >= width) return;
  Words* sums = reinterpret_cast<Words*>((beta ? dbeta_sums : dgamma_sums) + column + (upper ? 4 : 0));
  Words words = read_shared(sums);
#pragma unroll
  for (int c = 0; c < 4; ++c) words.at[c] = bits_of(float_of(words.at[c]) + four[c]);
  write(sums, words);
}

// Starts copying `rows` rows of a table (N, E) from global memory; zeros below them, up to `all_rows`.
STEER_DEVICE void copy_table(float* table, int stride, const float* source, int rows, int all_rows, int experts) {
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  if (experts % 4 == 0 && reinterpret_cast<std::uintptr_t>(source) % 16 == 0) {  // four numbers at once, two rows a warp
    constexpr int kLanes = kWarpSize / 2;
#pragma unroll 1
    for (int row = 2 * warp + lane / kLanes; row < all_rows; row += 2 * kWarps) {
#pragma unroll 1
      for (int e = lane % kLanes * 4; e < experts; e += 4 * kLanes) {
        if (row < rows)
          copy_async(table + row * stride + e, source + row * experts + e);
        else
          write(reinterpret_cast<Words*>(table + row * stride + e), {{0u, 0u, 0u, 0u}});
      }
    }
    return;
  }
#pragma unroll 1  // registers are short where this is called
  for (int row = warp; row < all_rows; row += kWarps) {
    float* to = table + row * stride;
    const float* from = source + row * experts;
#pragma unroll 1
    for (int e = lane; e < experts; e += kWarpSize) {
      if (row < rows)
        copy_word_async(to + e, from + e);
      else
        to[e] = 0.0f;
    }
  }
}

STEER_DEVICE void clear(float* from, int count) {
  for (int k = thread_index(); k < count; k += kThreads) from[k] = 0.0f;
}

// One step's sums of the first eight experts to a partial (E, columns): a lane has eight neighbours of two experts' rows.
STEER_DEVICE void write_outer(float* partial, int experts, int width, int column, const float (&sums)[4][4]) {
  const int i = thread_index() % kWarpSize / 4, q = thread_index() % 4;
  const int at = column + 8 * i;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const int e = 2 * q + k;
    if (e >= experts || at >= width) continue;  // the width is a multiple of eight
    Words* to = reinterpret_cast<Words*>(partial + static_cast<std::int64_t>(e) * width + at);
#pragma unroll
    for (int w = 0; w < 2; ++w)
      write(to + w, {{bits_of(sums[2 * w][k]), bits_of(sums[2 * w][2 + k]), bits_of(sums[2 * w + 1][k]), bits_of(sums[2 * w + 1][2 + k])}});
  }
}

}  // namespace steer::cuda
