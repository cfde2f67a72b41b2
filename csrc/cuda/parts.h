// Eight neighbouring numbers of a row, and how the tensor cores multiply numbers that are longer than theirs.
//
// The tensor cores take 16-bit operands and multiply them exactly. A number of 24 bits is cut into up to three bfloat16 numbers that add
// up to it, 8 bits each, and a product into the products of these parts; bfloat16 has float32's range, so nothing can overflow. How many
// parts are worth multiplying: where `fine`, three (float32's own precision); else two (16 bits, 2^-17 of the number, for what is
// rounded to 8 or 11 bits in the end). A bfloat16 is one part by itself, a float16, with its 11 bits, two. No part is multiplied whose
// product lies below the last that is kept.
#pragma once

#include <type_traits>

#include "device.h"

namespace steer::cuda {

constexpr int kWarpSize = 32;

template <typename T>
struct Chunk {
  static constexpr int kWords = 8 * sizeof(T) / 16;
  Words words[kWords];

  STEER_DEVICE float value(int i) const {
    if constexpr (std::is_same_v<T, float>) {
      return float_of(words[i / 4].at[i % 4]);
    } else {
      const std::uint32_t pair = words[0].at[i / 2];
      return widen(T{static_cast<std::uint16_t>(i % 2 == 0 ? pair & 0xffffu : pair >> 16)});
    }
  }
  STEER_DEVICE std::uint32_t word(int i) const { return words[i / 4].at[i % 4]; }
};

template <typename T>
STEER_DEVICE Chunk<T> zero_chunk() {
  Chunk<T> chunk;
#pragma unroll
  for (int w = 0; w < Chunk<T>::kWords; ++w) chunk.words[w] = {{0u, 0u, 0u, 0u}};
  return chunk;
}

template <typename T>
STEER_DEVICE Chunk<T> read_shared_chunk(const T* address) {
  Chunk<T> chunk;
#pragma unroll
  for (int w = 0; w < Chunk<T>::kWords; ++w) chunk.words[w] = read_shared(reinterpret_cast<const Words*>(address) + w);
  return chunk;
}

template <typename T>
STEER_DEVICE Chunk<T> read_only_chunk(const T* address) {
  Chunk<T> chunk;
#pragma unroll
  for (int w = 0; w < Chunk<T>::kWords; ++w) chunk.words[w] = read_only(reinterpret_cast<const Words*>(address) + w);
  return chunk;
}

template <typename T>
STEER_DEVICE Chunk<T> narrow_chunk(const float (&values)[8]) {
  Chunk<T> chunk;
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < 8; ++i) chunk.words[i / 4].at[i % 4] = bits_of(values[i]);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) chunk.words[0].at[i] = narrow_pair<T>(values[2 * i], values[2 * i + 1]);
  }
  return chunk;
}

template <typename T>
STEER_DEVICE void write_chunk(T* address, const Chunk<T>& chunk) {
#pragma unroll
  for (int w = 0; w < Chunk<T>::kWords; ++w) write(reinterpret_cast<Words*>(address) + w, chunk.words[w]);
}

template <typename T>
STEER_DEVICE void write_shared_chunk(T* address, const Chunk<T>& chunk) {
#pragma unroll
  for (int w = 0; w < Chunk<T>::kWords; ++w) write_shared(reinterpret_cast<Words*>(address) + w, chunk.words[w]);
}

template <typename T, bool fine>
constexpr int kParts = std::is_same_v<T, BFloat16> ? 1
                       : std::is_same_v<T, Half>   ? 2
                       : fine                      ? 3
                                                   : 2;

// Two numbers as `Count` words of two bfloat16 parts each, the largest first. All but the last are cut off, not rounded: cut numbers
// never grow, so infinity cannot come of a finite one.
template <int Count>
STEER_DEVICE void split_pair(float low, float high, std::uint32_t (&parts)[Count]) {
#pragma unroll
  for (int p = 0; p + 1 < Count; ++p) {
    parts[p] = high_halves(bits_of(low), bits_of(high));
    low -= float_of(bits_of(low) & 0xffff0000u);
    high -= float_of(bits_of(high) & 0xffff0000u);
  }
  parts[Count - 1] = narrow_pair<BFloat16>(low, high);
}

// A chunk as pairs of neighbours, for products along the row. 16-bit numbers are taken as they are where `Count` is 1.
template <int Count, typename T>
STEER_DEVICE void neighbours(const Chunk<T>& chunk, std::uint32_t (&pairs)[Count][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (Count == 1) {
      pairs[0][i] = chunk.word(i);
    } else {
      std::uint32_t parts[Count];
      split_pair(chunk.value(2 * i), chunk.value(2 * i + 1), parts);
#pragma unroll
      for (int p = 0; p < Count; ++p) pairs[p][i] = parts[p];
    }
  }
}

// Two rows' chunks as pairs (first row, second row) of each of the eight columns, for products across rows.
template <int Count, typename T>
STEER_DEVICE void across(const Chunk<T>& first, const Chunk<T>& second, std::uint32_t (&pairs)[Count][8]) {
  if constexpr (Count == 1) {
    static_assert(sizeof(T) == 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pairs[0][2 * i] = low_halves(first.word(i), second.word(i));
      pairs[0][2 * i + 1] = high_halves(first.word(i), second.word(i));
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      std::uint32_t parts[Count];
      split_pair(first.value(i), second.value(i), parts);
#pragma unroll
      for (int p = 0; p < Count; ++p) pairs[p][i] = parts[p];
    }
  }
}

// Whether part i of one factor times part j of the other is kept.
template <int A, int B>
constexpr bool kept(int i, int j) {
  return i + j < (A > B ? A : B);
}

}  // namespace steer::cuda
