// The second pass of a backward: adds the splits' partial sums up, in an order that depends on nothing but their number.
//
//   dW = sum dz^T y - s M V      dV = s sum g^T d      db, ds, dgamma, dbeta
#pragma once

#include "gradient.h"

namespace steer::cuda {

constexpr int kReductionColumns = 128;

// Columns [column, column + 128) of the sum over splits of partials (width), `pitch` apart: thread t < 128 returns column + t's.
STEER_DEVICE float sum_splits(const float* partials, std::int64_t pitch, int splits, int column, int width, float* scratch) {
  const int warp = thread_index() / kWarpSize, lane = thread_index() % kWarpSize;
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll 4
  for (int split = warp; split < splits; split += kWarps)
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int at = column + lane + c * kWarpSize;
      if (at < width) sums[c] += partials[split * pitch + at];
    }
  sync_block();
#pragma unroll
  for (int c = 0; c < 4; ++c) scratch[warp * kReductionColumns + lane + c * kWarpSize] = sums[c];
  sync_block();
  float sum = 0.0f;
  if (thread_index() < kReductionColumns)
    for (int w = 0; w < kWarps; ++w) sum += scratch[w * kReductionColumns + thread_index()];
  return sum;
}

// The sum over splits of one number, `pitch` apart, by a warp.
STEER_DEVICE float sum_numbers(const float* partials, int pitch, int splits) {
  double sum = 0.0;
  for (int split = thread_index() % kWarpSize; split < splits; split += kWarpSize)
    sum += partials[static_cast<std::int64_t>(split) * pitch];
  return sum_over_warp(static_cast<float>(sum));
}

// sum_f M[f] V[f] of one column of V (E, D), which starts at `column`. Unrolled: the loads have to be under way together.
template <typename T>
STEER_DEVICE float mix_column(const float* M, const T* column, int experts, int width) {
  float sum = 0.0f;
#pragma unroll 8
  for (int f = 0; f < experts; ++f) {
    const T value = column[static_cast<std::int64_t>(f) * width];
    if constexpr (std::is_same_v<T, double>)
      sum = multiply_add(M[f], static_cast<float>(value), sum);
    else
      sum = multiply_add(M[f], widen(value), sum);
  }
  return sum;
}

STEER_DEVICE float mix_column(const float* M, const Parameter& vectors, int experts, int width, int column) {
  switch (vectors.dtype) {
    case DType::kFloat32:
      return mix_column(M, static_cast<const float*>(vectors.data) + column, experts, width);
    case DType::kFloat16:
      return mix_column(M, static_cast<const Half*>(vectors.data) + column, experts, width);
    case DType::kBFloat16:
      return mix_column(M, static_cast<const BFloat16*>(vectors.data) + column, experts, width);
    default:
      return mix_column(M, static_cast<const double*>(vectors.data) + column, experts, width);
  }
}

// Block (x, e): 128 columns of expert e; after the experts, of what belongs to none.
STEER_KERNEL STEER_THREADS(kThreads, kResident) steer_reduction_kernel(const Backward call, const Workspace workspace) {
  const Problem& problem = call.problem;
  const int width = static_cast<int>(problem.width), experts = static_cast<int>(problem.experts), splits = workspace.splits;
  const int column = block_index() * kReductionColumns, e = block_index_y();
  const int mine = column + thread_index();
  const bool writes = thread_index() < kReductionColumns && mine < width;
  float* scratch = reinterpret_cast<float*>(shared_memory());
  float* M = scratch + kWarps * kReductionColumns;  // (E): row e
  const float s = read_parameter(problem.scale, 0);
  const std::int64_t all = static_cast<std::int64_t>(experts) * width, row = static_cast<std::int64_t>(e) * width;

  if (e < experts) {
    if (call.dweight != nullptr) {
      const std::int64_t pairs = static_cast<std::int64_t>(experts) * experts;
      for (int from = 0; from < experts; from += kReductionColumns) {
        const int f = from + thread_index();
        const float sum = sum_splits(workspace.mixed + e * experts, pairs, splits, from, experts, scratch);
        if (thread_index() < kReductionColumns && f < experts) M[f] = sum;
      }
      const float sum = sum_splits(workspace.dweight + row, all, splits, column, width, scratch);
      if (writes) static_cast<float*>(call.dweight)[row + mine] = sum - s * mix_column(M, problem.vectors, experts, width, mine);
    }
    if (call.dvectors != nullptr) {
      const float sum = sum_splits(workspace.dvectors + row, all, splits, column, width, scratch);
      if (writes) static_cast<float*>(call.dvectors)[row + mine] = s * sum;
    }
    return;
  }
  if (workspace.dgamma != nullptr) {
    const float sum = sum_splits(workspace.dgamma, width, splits, column, width, scratch);
    if (writes) static_cast<float*>(call.dnorm_weight)[mine] = sum;
  }
  if (workspace.dbeta != nullptr) {
    const float sum = sum_splits(workspace.dbeta, width, splits, column, width, scratch);
    if (writes) static_cast<float*>(call.dnorm_bias)[mine] = sum;
  }
  if (block_index() > 0) return;
  if (call.dbias != nullptr)
    for (int f = thread_index() / kWarpSize; f < experts; f += kWarps) {
      const float sum = sum_numbers(workspace.dbias + f, experts, splits);
      if (thread_index() % kWarpSize == 0) static_cast<float*>(call.dbias)[f] = sum;
    }
  if (call.dscale != nullptr && thread_index() < kWarpSize) {
    const float sum = sum_numbers(workspace.dscale, 1, splits);
    if (thread_index() == 0) *static_cast<float*>(call.dscale) = sum;
  }
}

}  // namespace steer::cuda
