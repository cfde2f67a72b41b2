// Where a tile's frames lie: whole windows of the pool, never across clips. Without a pool every frame is a window, and all are one clip.
#pragma once

#include "products.h"

namespace steer::cuda {

// How a pass is laid out on the machine; made by plan.h.
struct Plan {
  int frames = 0;          // of a tile: whole windows
  int stages = 1;          // tiles in shared memory at a time
  int stride = 0;          // elements between a tile's rows
  std::int64_t clips = 0;  // that are tiled one by one
  std::int64_t clip_frames = 0, clip_windows = 0, clip_tiles = 0;
  int window = 1;  // frames of a whole window
  int blocks = 0;
  std::int64_t shared_bytes = 0;

  STEER_BOTH std::int64_t tiles() const { return clips * clip_tiles; }
};

struct Span {
  std::int64_t first;         // frame
  std::int64_t first_window;  // row of `normed` and `stats`
  int frames, windows;
};

STEER_DEVICE Span span_of(const Plan& plan, std::int64_t tile) {
  if (plan.clips == 1 && plan.window == 1) {  // as always without a pool: nothing to divide
    const std::int64_t start = tile * plan.frames, left = plan.clip_frames - start;
    const int frames = static_cast<int>(left < plan.frames ? left : plan.frames);
    return {start, start, frames, frames};
  }
  const std::int64_t clip = tile / plan.clip_tiles, start = tile % plan.clip_tiles * plan.frames;
  const std::int64_t left = plan.clip_frames - start;
  const int frames = static_cast<int>(left < plan.frames ? left : plan.frames);
  return {clip * plan.clip_frames + start, clip * plan.clip_windows + start / plan.window, frames,
          (frames + plan.window - 1) / plan.window};
}

STEER_DEVICE int window_frames(const Plan& plan, const Span& span, int window) {
  const int left = span.frames - window * plan.window;
  return left < plan.window ? left : plan.window;
}

// The pool of one window's eight columns, p (8), from its frames in shared memory; of a maximum also its frame in the window, by column.
template <typename S>
STEER_DEVICE void pool_chunk(Pool pool, const S* column, int stride, int frames, float (&p)[8], int (&argmax)[8]) {
  const Chunk<S> first = read_shared_chunk(column);
#pragma unroll
  for (int c = 0; c < 8; ++c) p[c] = first.value(c), argmax[c] = 0;
  for (int f = 1; f < frames; ++f) {
    const Chunk<S> next = read_shared_chunk(column + f * stride);
#pragma unroll
    for (int c = 0; c < 8; ++c) {
      const float value = next.value(c);
      if (pool == Pool::kMean) {
        p[c] += value;
      } else if (value > p[c] || value != value) {
        p[c] = value;
        argmax[c] = f;
      }
    }
  }
  if (pool == Pool::kMean && frames > 1)
#pragma unroll
    for (int c = 0; c < 8; ++c) p[c] /= static_cast<float>(frames);
}

// Eight columns of a (D) parameter in whatever type it is stored; `otherwise` where it is absent.
STEER_DEVICE void read_parameter_chunk(const Parameter& parameter, int column, float otherwise, float (&values)[8]) {
  const auto widened = [&values](const auto& chunk) {
#pragma unroll
    for (int c = 0; c < 8; ++c) values[c] = chunk.value(c);
  };
  if (parameter.data == nullptr) {
#pragma unroll
    for (int c = 0; c < 8; ++c) values[c] = otherwise;
  } else if (parameter.dtype == DType::kFloat32) {
    widened(read_only_chunk(static_cast<const float*>(parameter.data) + column));
  } else if (parameter.dtype == DType::kFloat16) {
    widened(read_only_chunk(static_cast<const Half*>(parameter.data) + column));
  } else {
    widened(read_only_chunk(static_cast<const BFloat16*>(parameter.data) + column));
  }
}

// A (D) parameter in shared memory, in float32, by the whole block: of every eight columns four in the first half of the room and four in
// the second, so that lanes which read eight neighbours each meet different banks.
STEER_DEVICE void copy_parameter(const Parameter& parameter, int width, float otherwise, float* to) {
#pragma unroll 1
  for (int column = 8 * thread_index(); column < width; column += 8 * kThreads) {
    float values[8];
    read_parameter_chunk(parameter, column, otherwise, values);
    const Chunk<float> chunk = narrow_chunk<float>(values);
    write(reinterpret_cast<Words*>(to + column / 2), chunk.words[0]);
    write(reinterpret_cast<Words*>(to + width / 2 + column / 2), chunk.words[1]);
  }
}

STEER_DEVICE void read_copied(const float* copied, int width, int column, float (&values)[8]) {
  const Chunk<float> chunk{{read_shared(reinterpret_cast<const Words*>(copied + column / 2)),
                            read_shared(reinterpret_cast<const Words*>(copied + width / 2 + column / 2))}};
#pragma unroll
  for (int c = 0; c < 8; ++c) values[c] = chunk.value(c);
}

// One number of a parameter in whatever type it is stored.
STEER_DEVICE float read_parameter(const Parameter& parameter, std::int64_t at) {
  switch (parameter.dtype) {
    case DType::kFloat32:
      return static_cast<const float*>(parameter.data)[at];
    case DType::kFloat16:
      return widen(static_cast<const Half*>(parameter.data)[at]);
    case DType::kBFloat16:
      return widen(static_cast<const BFloat16*>(parameter.data)[at]);
    default:
      return static_cast<float>(static_cast<const double*>(parameter.data)[at]);
  }
}

// Starts copying `rows` rows of a stream into a tile: the source's row r to the tile's row r * `spacing`. A warp takes whole rows, so that
// nothing has to be divided by the width.
template <typename S>
STEER_DEVICE void copy_rows(Tile<S> tile, const S* source, int rows, int spacing, int width) {
  constexpr int kEach = 16 / sizeof(S);
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  for (int row = warp; row < rows; row += kWarps) {
    S* to = tile.at(row * spacing, kEach * lane);
    const S* from = source + static_cast<std::int64_t>(row) * width + kEach * lane;
    for (int left = width - kEach * lane; left > 0; left -= kEach * kWarpSize) {
      copy_async(to, from);
      to += kEach * kWarpSize, from += kEach * kWarpSize;
    }
  }
}

}  // namespace steer::cuda
