// The three products that do nearly all the arithmetic, on the tensor cores, by a warp each:
//
//   dots    z (n, e)    = sum_d h[n][d] P[e][d]        logits u W^T, and a = d V^T
//   mix     out (n, d)  = sum_e c[n][e] P[e][d]        g V, and dz W
//   outer   acc (e, d) += sum_n c[n][e] h[n][d]        dW = dz^T y, and dV = g^T d
//
// h is a tile of up to 16 frames in shared memory, P a parameter (E, D) in global memory, read as it is stored, c a table of numbers in
// shared memory. The block's warps take turns at steps of the width. The order of the numbers that are summed is free, and so is the order
// of columns among the tensor cores' outputs: both are chosen so that a lane always reads and writes eight neighbours of a row, a
// `Chunk`, and no operand has to be moved between lanes.
//
// The tensor cores cut off what does not fit when they add. So every step starts from zero, small parts first, and is added to the
// running sum in float32 with rounding. A sum over experts or columns whose factors are cut to 16 bits anyway stays in the tensor cores:
// what its few dozen additions lose, 2^-24 of it each, is less than the parts that were left out.
#pragma once

#include "parts.h"

namespace steer::cuda {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kResident = 2;      // blocks of a multiprocessor, whose registers are not enough for a third
constexpr int kRows = 16;         // frames the tensor cores take at once
constexpr int kDotsStep = 32;     // columns
constexpr int kMixStep = 64;      // columns, of `outer` too
constexpr int kExpertGroup = 32;  // experts whose sums a warp holds at once

STEER_BOTH constexpr int round_up(int value, int to) { return (value + to - 1) / to * to; }

// A table c (16, E) in shared memory, padded with zeros to whole products; rows lie eight banks apart. It starts at an even place, as its
// rows do, for `mix` reads pairs.
STEER_BOTH constexpr int table_stride(int experts) { return round_up(experts, 16) + 8; }

// Rows of a tile, this far apart: 64 bytes more than whole lines, so that two rows read at once meet different banks.
template <typename S>
STEER_BOTH int tile_stride(int width) {
  const int bytes = width * static_cast<int>(sizeof(S)), line = (bytes + 127) / 128 * 128;
  return (bytes + 64 <= line ? line - 64 : line + 64) / static_cast<int>(sizeof(S));
}

// `exists` says whether a pass has the tile. Its address lies in shared memory either way: of one that may be null the compiler does not
// know where it leads, and reads take the longer way that could go anywhere.
template <typename T>
struct Tile {
  T* data;
  int stride;
  bool exists = true;

  STEER_DEVICE T* at(int row, int column) const { return data + row * stride + column; }
};

// One step's share of `sums` [4][4]: experts `first` + 8 j + 2 q (+ 1), frames i (+ 8). `h` is `first_tile`, plus `second_tile` where there
// is one; `rows` frames of it exist.
//
// `together`: no branch between the groups of eight experts, also of such as do not exist, so that their products overlap. M is the type
// multiplied in. Where tiles and M are one type, each tile is multiplied as it is; else their sum is cut into parts.
template <typename M, bool fine, bool together, typename S, typename P>
STEER_DEVICE void dots(Tile<S> first_tile, Tile<S> second_tile, int rows, const P* parameter, int first, int experts, int width,
                       float (&sums)[4][4]) {
  constexpr bool kAsStored = std::is_same_v<S, M>;
  constexpr int kB = std::is_same_v<P, M> ? 1 : kParts<P, fine>;
  constexpr int kA = kAsStored ? 2 : kParts<float, true>;
  const int warp = thread_index() / kWarpSize, i = thread_index() % kWarpSize / 4, q = thread_index() % 4;
  const bool second = second_tile.exists;
  // Frames and experts beyond the last are read as the last, for nobody reads their sums; and columns, whose numbers of P are zero.
  const int low = i < rows ? i : rows - 1, high = i + 8 < rows ? i + 8 : rows - 1;
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int c = 0; c < 4; ++c) sums[j][c] = 0.0f;

  for (int step = warp; step * kDotsStep < width; step += kWarps) {
    const int wanted = step * kDotsStep + 8 * q, column = wanted < width ? wanted : width - 8;
    std::uint32_t a[2][kA][4];  // [frame i or i + 8][part, or tile][pair]
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = half == 0 ? low : high;
      const Chunk<S> one = read_shared_chunk(first_tile.at(row, column));
      const Chunk<S> two = second ? read_shared_chunk(second_tile.at(row, column)) : zero_chunk<S>();
      if constexpr (kAsStored) {
#pragma unroll
        for (int w = 0; w < 4; ++w) a[half][0][w] = one.word(w), a[half][1][w] = two.word(w);
      } else {
        float u[8];
#pragma unroll
        for (int c = 0; c < 8; ++c) u[c] = one.value(c) + two.value(c);
        neighbours<kA>(narrow_chunk<float>(u), a[half]);
      }
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (!together && first + 8 * j >= experts) break;
      const int e = first + 8 * j + i < experts ? first + 8 * j + i : experts - 1;
      std::uint32_t b[kB][4];
      neighbours<kB>(wanted < width ? read_only_chunk(parameter + (e * width + column)) : zero_chunk<P>(), b);
      float fresh[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      float (&sum)[4] = fine ? fresh : sums[j];
#pragma unroll
      for (int order = kA + kB - 2; order >= 0; --order)
#pragma unroll
        for (int p = 0; p < kA; ++p) {
          const int r = kAsStored ? (p == 0 ? order : order - 1) : order - p;
          // As stored, p counts tiles, which are of one size: the second goes with every part, too.
          if (r < 0 || r >= kB || (!kAsStored && !kept<kA, kB>(p, r))) continue;
          mma<M>(sum, a[0][p][0], a[1][p][0], a[0][p][1], a[1][p][1], b[r][0], b[r][1]);
          mma<M>(sum, a[0][p][2], a[1][p][2], a[0][p][3], a[1][p][3], b[r][2], b[r][3]);
        }
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[j][c] = fine ? sums[j][c] + sum[c] : sum[c];
    }
  }
}

// Where the warps' partial sums of a frame and an expert lie, (warps, 16, 32): of four rows, eights of experts in four orders, so that the
// rows' pairs, or eights, meet every bank once.
constexpr int kPartials = kWarps * kRows * kExpertGroup;
STEER_DEVICE int partial_at(int row, int expert) { return row * kExpertGroup + (expert ^ (8 * (row & 3))); }

// z (16, E) = h P^T into a table in shared memory, by all warps; `partials` (kPartials) is scratch. Ends with a barrier.
template <typename M, bool fine, typename S, typename P>
STEER_DEVICE void block_dots(Tile<S> first_tile, Tile<S> second_tile, int rows, const P* parameter, int experts, int width, float* partials,
                             float* z, int z_stride) {
  const int warp = thread_index() / kWarpSize, i = thread_index() % kWarpSize / 4, q = thread_index() % 4;
  for (int first = 0; first < experts; first += kExpertGroup) {
    float sums[4][4];
    // Numbers in several parts would not leave the registers for it.
    constexpr bool kOnePart = std::is_same_v<S, M> && std::is_same_v<P, M>;
    if (kOnePart && experts - first > 8)
      dots<M, fine, kOnePart>(first_tile, second_tile, rows, parameter, first, experts, width, sums);
    else
      dots<M, fine, false>(first_tile, second_tile, rows, parameter, first, experts, width, sums);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (first + 8 * j >= experts) break;
#pragma unroll
      for (int half = 0; half < 2; ++half)
        write_pair(partials + partial_at(warp * kRows + i + 8 * half, 8 * j + 2 * q), {sums[j][2 * half], sums[j][2 * half + 1]});
    }
    sync_block();
    const int group = experts - first <= 8 ? 8 : kExpertGroup;
#pragma unroll 1
    for (int k = thread_index(); k < kRows * group; k += kThreads) {
      const int row = group == 8 ? k / 8 : k / kExpertGroup, e = k % group;
      if (first + e >= experts) continue;
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) sum += partials[partial_at(w * kRows + row, e)];
      z[row * z_stride + first + e] = sum;
    }
    sync_block();
  }
}

// sums [8][4] += h over one step of the width, as `mix` holds it: the product with the unit matrix, which costs less than taking numbers
// apart and adding them. Frames and columns beyond the last are read as the last.
STEER_DEVICE void add_exactly(Tile<BFloat16> h, int rows, int column, int width, float (&sums)[8][4]) {
  const int i = thread_index() % kWarpSize / 4, q = thread_index() % 4;
  const std::uint32_t unit = i == 2 * q ? 0x3f80u : i == 2 * q + 1 ? 0x3f800000u : 0u;  // one, as bfloat16
  const int one = column + 8 * q < width ? column + 8 * q : width - 8,
            other = column + 8 * q + 32 < width ? column + 8 * q + 32 : width - 8;
  std::uint32_t a[2][1][8];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = i + 8 * half < rows ? i + 8 * half : rows - 1;
    across<1>(read_shared_chunk(h.at(row, one)), read_shared_chunk(h.at(row, other)), a[half]);
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) mma_k8(sums[j], a[0][0][j], a[1][0][j], unit);
}

// out = c P, eight columns of a frame at a time to `emit(row, column, values)`, for this warp's steps. `fine`: to float32's precision.
// `onto(column, sums)` may add to a step's sums before.
template <bool fine, typename P, typename Onto, typename Emit>
STEER_DEVICE void mix(const float* table, int stride, int rows, const P* parameter, int experts, int width, Onto onto, Emit emit) {
  constexpr int kA = fine ? 3 : 2, kB = kParts<P, fine>;
  const int warp = thread_index() / kWarpSize, i = thread_index() % kWarpSize / 4, q = thread_index() % 4;
  const int chunk = i / 2 + 4 * (i % 2);  // output columns 2q and 2q + 1 of a product are then chunks q and q + 4
  for (int step = warp; step * kMixStep < width; step += kWarps) {
    // Columns beyond the last are read as the last: nobody takes them.
    const int wanted = step * kMixStep + 8 * chunk, column = wanted < width ? wanted : width - 8;
    float sums[8][4];
    // The share of eight experts, or of sixteen; not added to anything where it is the first.
    const auto share = [&](int first, auto eights, auto add) {
      constexpr int kEights = decltype(eights)::value;
      std::uint32_t a[kEights][2][kA], b[kEights][kB][8];
#pragma unroll
      for (int k = 0; k < kEights; ++k) {
        const int e = first + 8 * k + 2 * q;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float* c = table + (i + 8 * half) * stride + e;
          const Pair pair = fine ? Pair{c[0], c[1]} : read_pair(c);  // a pair's neighbouring registers are one too many for three parts
          split_pair(pair.first, pair.second, a[k][half]);
        }
        const P* row = parameter + static_cast<std::int64_t>(e) * width + column;
        across<kB>(e < experts ? read_only_chunk(row) : zero_chunk<P>(), e + 1 < experts ? read_only_chunk(row + width) : zero_chunk<P>(),
                   b[k]);
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float fresh[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        float (&sum)[4] = !fine && add ? sums[j] : fresh;
#pragma unroll
        for (int order = kA + kB - 2; order >= 0; --order)
#pragma unroll
          for (int p = 0; p < kA; ++p) {
            const int r = order - p;
            if (r < 0 || r >= kB || !kept<kA, kB>(p, r)) continue;
            if constexpr (kEights == 2)
              mma<BFloat16>(sum, a[0][0][p], a[0][1][p], a[1][0][p], a[1][1][p], b[0][r][j], b[1][r][j]);
            else
              mma_k8(sum, a[0][0][p], a[0][1][p], b[0][r][j]);
          }
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[j][c] = fine && add ? sums[j][c] + sum[c] : sum[c];
      }
    };
    using One = std::integral_constant<int, 1>;
    using Two = std::integral_constant<int, 2>;
    if constexpr (fine) {  // three parts of sixteen experts would take all registers
      share(0, One(), std::false_type());
#pragma unroll 1
      for (int first = 8; first < experts; first += 8) share(first, One(), std::true_type());
    } else if (experts <= 8) {
      share(0, One(), std::false_type());
    } else {
      share(0, Two(), std::false_type());
#pragma unroll 1
      for (int first = 16; first < experts; first += 16) share(first, Two(), std::true_type());
    }
    onto(step * kMixStep, sums);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int row = i + 8 * (c / 2), at = step * kMixStep + 8 * (q + 4 * (c % 2));
      float values[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) values[j] = sums[j][c];
      if (row < rows && at < width) emit(row, at, values);
    }
  }
}

// acc [4][4] += h^T c over one step of the width, eight experts and 16 frames: acc[t] holds columns 8 i + 2 t (c < 2) and the next,
// experts 2 q + c % 2. `b` [half][part]: frames q and q + 4, and q + 8 and q + 12, of expert i, from `outer_factor`.
template <int Parts>
STEER_DEVICE void outer_factor(const float* table, int stride, std::uint32_t (&b)[2][Parts]) {
  const int i = thread_index() % kWarpSize / 4, q = thread_index() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float* c = table + (q + 8 * half) * stride + i;
    split_pair(c[0], c[4 * stride], b[half]);
  }
}

// `rest`, where it exists, holds second parts of numbers whose first are in `h`.
template <int A, int B, typename T>
STEER_DEVICE void outer(Tile<T> h, Tile<T> rest, int rows, int column, int width, const std::uint32_t (&b)[2][B], float (&sums)[4][4]) {
  const int i = thread_index() % kWarpSize / 4, q = thread_index() % 4;
  // Frames and columns beyond the last are read as the last: those frames meet zeros in the table, and nobody takes those columns.
  const int last = (width - 1) / 8 * 8, mine = column + 8 * i < last ? column + 8 * i : last;
  const auto pairs = [&](const Tile<T>& tile, int half, std::uint32_t (&a)[A][8]) {
    const int row = q + 8 * half, low = row < rows ? row : rows - 1, high = row + 4 < rows ? row + 4 : rows - 1;
    across<A>(read_shared_chunk(tile.at(low, mine)), read_shared_chunk(tile.at(high, mine)), a);
  };
  // One product takes all sixteen frames of numbers that are one part; of others, whose parts take the registers, eight at a time.
  if constexpr (A == 1) {
    float fresh[4][4] = {};
    const auto add = [&](const Tile<T>& tile) {
      std::uint32_t a[2][1][8];
      pairs(tile, 0, a[0]), pairs(tile, 1, a[1]);
#pragma unroll
      for (int t = 0; t < 4; ++t)
#pragma unroll
        for (int r = B - 1; r >= 0; --r)
          mma<BFloat16>(fresh[t], a[0][0][2 * t], a[0][0][2 * t + 1], a[1][0][2 * t], a[1][0][2 * t + 1], b[0][r], b[1][r]);
    };
    if (rest.exists) add(rest);
    add(h);
#pragma unroll
    for (int t = 0; t < 4; ++t)
#pragma unroll
      for (int c = 0; c < 4; ++c) sums[t][c] += fresh[t][c];
  } else {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (8 * half >= rows) break;
      std::uint32_t a[A][8];
      pairs(h, half, a);
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        float sum[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
        for (int order = A + B - 2; order >= 0; --order)
#pragma unroll
          for (int p = 0; p < A; ++p)
            if (order - p >= 0 && order - p < B && kept<A, B>(p, order - p)) mma_k8(sum, a[p][2 * t], a[p][2 * t + 1], b[half][order - p]);
#pragma unroll
        for (int c = 0; c < 4; ++c) sums[t][c] += sum[c];
      }
    }
  }
}
template <int A, int B, typename T>
STEER_DEVICE void outer(Tile<T> h, int rows, int column, int width, const std::uint32_t (&b)[2][B], float (&sums)[4][4]) {
  outer<A, B>(h, Tile<T>{h.data, h.stride, false}, rows, column, width, b, sums);
}

}  // namespace steer::cuda
