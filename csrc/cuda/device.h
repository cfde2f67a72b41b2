// What the kernels ask of the machine: who am I, barriers, shuffles, asynchronous copies, conversions, the tensor cores' products.
//
// Nothing below names CUDA outside of this file and launch.h, so that the tests can compile the same kernels for the host, against
// tests/kernels/cuda_emulator/emulator.h, and run every thread of them on a machine without a GPU.
#pragma once

#include <cstdint>

#include "../steer.h"

namespace steer::cuda {

struct Half {
  std::uint16_t bits;
};
struct BFloat16 {
  std::uint16_t bits;
};
// 16 bytes: one access.
struct alignas(16) Words {
  std::uint32_t at[4];
};
// Two neighbours of a table of floats, the first at an even place: one access, where one each would meet every bank twice.
struct alignas(8) Pair {
  float first, second;
};

}  // namespace steer::cuda

#if !defined(__CUDACC__)

#include "emulator.h"

#else

#include <cuda_runtime.h>

#define STEER_KERNEL __global__ void
#define STEER_THREADS(threads, blocks) __launch_bounds__(threads, blocks)
#define STEER_DEVICE __device__ __forceinline__
#define STEER_BOTH __host__ __device__ __forceinline__

namespace steer::cuda {

STEER_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
STEER_DEVICE int block_index() { return static_cast<int>(blockIdx.x); }
STEER_DEVICE int block_index_y() { return static_cast<int>(blockIdx.y); }
STEER_DEVICE int block_index_z() { return static_cast<int>(blockIdx.z); }
STEER_DEVICE int grid_size() { return static_cast<int>(gridDim.x); }
STEER_DEVICE int grid_size_y() { return static_cast<int>(gridDim.y); }

STEER_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

STEER_DEVICE void sync_block() { __syncthreads(); }
STEER_DEVICE void sync_warp() { __syncwarp(); }
STEER_DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

STEER_DEVICE std::uint32_t bits_of(float value) { return __float_as_uint(value); }
STEER_DEVICE float float_of(std::uint32_t bits) { return __uint_as_float(bits); }
STEER_DEVICE float exponential(float value) { return expf(value); }
STEER_DEVICE float square_root(float value) { return sqrtf(value); }
STEER_DEVICE float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }

// The low halves, and the high halves, of two words.
STEER_DEVICE std::uint32_t low_halves(std::uint32_t a, std::uint32_t b) { return __byte_perm(a, b, 0x5410); }
STEER_DEVICE std::uint32_t high_halves(std::uint32_t a, std::uint32_t b) { return __byte_perm(a, b, 0x7632); }

STEER_DEVICE float widen(float value) { return value; }
STEER_DEVICE float widen(BFloat16 value) { return float_of(static_cast<std::uint32_t>(value.bits) << 16); }
STEER_DEVICE float widen(Half value) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
  return wide;
}

template <typename T>
STEER_DEVICE T narrow(float value);
template <>
STEER_DEVICE float narrow<float>(float value) {
  return value;
}
template <>
STEER_DEVICE Half narrow<Half>(float value) {
  Half result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}
template <>
STEER_DEVICE BFloat16 narrow<BFloat16>(float value) {
  BFloat16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
}

// Two numbers rounded into one word, the first in the low half.
template <typename T>
STEER_DEVICE std::uint32_t narrow_pair(float low, float high);
template <>
STEER_DEVICE std::uint32_t narrow_pair<Half>(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
STEER_DEVICE std::uint32_t narrow_pair<BFloat16>(float low, float high) {
  std::uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

STEER_DEVICE Words read_only(const Words* address) {
  const uint4 value = __ldg(reinterpret_cast<const uint4*>(address));
  return {{value.x, value.y, value.z, value.w}};
}
STEER_DEVICE Words read_shared(const Words* address) {
  const uint4 value = *reinterpret_cast<const uint4*>(address);
  return {{value.x, value.y, value.z, value.w}};
}
STEER_DEVICE void write(Words* address, const Words& value) {
  *reinterpret_cast<uint4*>(address) = make_uint4(value.at[0], value.at[1], value.at[2], value.at[3]);
}

// To shared memory, and in one piece: a plain write the compiler may cut into some of a word each, which meet every bank several times.
STEER_DEVICE void write_shared(Words* address, const Words& value) {
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(address))),
               "r"(value.at[0]), "r"(value.at[1]), "r"(value.at[2]), "r"(value.at[3])
               : "memory");
}
STEER_DEVICE void write_pair(float* address, const Pair& value) {
  asm volatile("st.shared.v2.f32 [%0], {%1,%2};" ::"r"(static_cast<std::uint32_t>(__cvta_generic_to_shared(address))), "f"(value.first),
               "f"(value.second)
               : "memory");
}
STEER_DEVICE Pair read_pair(const float* address) {
  const float2 value = *reinterpret_cast<const float2*>(address);
  return {value.x, value.y};
}

// Four matrices of 8 x 8 16-bit numbers from shared memory, each turned over: lane l gives the address of row l % 8 of matrix l / 8, and
// lane 4 i + q receives column i of the rows 2 q and 2 q + 1, a matrix a word. So `mma` takes operands whose sum runs down the rows.
STEER_DEVICE Words read_transposed(const void* shared) {
  const std::uint32_t address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  Words words;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(words.at[0]), "=r"(words.at[1]), "=r"(words.at[2]), "=r"(words.at[3])
               : "r"(address)
               : "memory");
  return words;
}

// 16 bytes from global to shared memory, on their own way: past the registers and the first cache level.
STEER_DEVICE void copy_async(void* shared, const void* global) {
  const std::uint32_t address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
// 4 bytes likewise, through the first cache level.
STEER_DEVICE void copy_word_async(void* shared, const void* global) {
  const std::uint32_t address = static_cast<std::uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(address), "l"(global) : "memory");
}
STEER_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `Pending` of this thread's latest groups of copies are still under way.
template <int Pending>
STEER_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// c (16, 8) += a (16, 16) b (16, 8) on a warp's tensor core. Lane 4 i + q holds, two neighbours of k in a word,
//   a[0] (i, 2q)  a[1] (i + 8, 2q)  a[2] (i, 2q + 8)  a[3] (i + 8, 2q + 8)     b[0] (2q, i)  b[1] (2q + 8, i)
//   c[0] (i, 2q)  c[1] (i, 2q + 1)  c[2] (i + 8, 2q)  c[3] (i + 8, 2q + 1)
template <typename T>
STEER_DEVICE void mma(float (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2, std::uint32_t a3, std::uint32_t b0,
                      std::uint32_t b1);
template <>
STEER_DEVICE void mma<BFloat16>(float (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2, std::uint32_t a3, std::uint32_t b0,
                                std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
template <>
STEER_DEVICE void mma<Half>(float (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t a2, std::uint32_t a3, std::uint32_t b0,
                            std::uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
// The same with k = 8: a[0], a[1] and b[0] only.
STEER_DEVICE void mma_k8(float (&c)[4], std::uint32_t a0, std::uint32_t a1, std::uint32_t b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(b0));
}

}  // namespace steer::cuda

#endif
