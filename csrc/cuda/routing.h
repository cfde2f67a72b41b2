// Gates from logits, and the gradient back through them, a frame at a time by one warp: lane l has experts l, l + 32, ...
#pragma once

#include "parts.h"

namespace steer::cuda {

constexpr int kMaxExperts = 256;
constexpr int kPerLane = kMaxExperts / kWarpSize;

template <typename Combine>
STEER_DEVICE float over_warp(float value, Combine combine) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2) value = combine(value, shuffle_xor(value, mask));
  return value;
}
STEER_DEVICE float sum_over_warp(float value) {
  return over_warp(value, [](float a, float b) { return a + b; });
}
STEER_DEVICE float max_over_warp(float value) {
  return over_warp(value, [](float a, float b) { return a < b ? b : a; });
}

// Whole numbers in the order of the logits: both zeros are one, NaN is the largest.
STEER_DEVICE std::int32_t rank_key(float z) {
  if (z != z) return 0x7fffffff;
  const std::int32_t bits = static_cast<std::int32_t>(bits_of(z + 0.0f));
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

// Up to 32 experts, a warp routes several frames at once: lane l has expert l % group of frame l / group.
STEER_DEVICE int group_of(int experts) { return experts <= 8 ? 8 : experts <= 16 ? 16 : kWarpSize; }

template <typename Combine>
STEER_DEVICE float over_group(float value, int group, Combine combine) {
#pragma unroll
  for (int mask = kWarpSize / 2; mask > 0; mask /= 2)
    if (mask < group) value = combine(value, shuffle_xor(value, mask));
  return value;
}
STEER_DEVICE float sum_over_group(float value, int group) {
  return over_group(value, group, [](float a, float b) { return a + b; });
}

// g = route(z + b) of a group's frame, up to 32 experts. `z` (E) lies in shared memory, where `g` receives s g, which is what gets mixed; g
// itself goes to `gates` and the full softmax, where not null, to `probs`, in global memory. Lanes without a frame come along, and write
// nothing.
STEER_DEVICE void route_group(const Problem& problem, int group, bool there, float bias, float s, float* z, float* g, float* gates,
                              float* probs) {
  const int e = thread_index() % group, experts = static_cast<int>(problem.experts), top_k = static_cast<int>(problem.top_k);
  constexpr float kLowest = -__builtin_huge_valf();
  const bool mine = there && e < experts;
  const float logit = mine ? z[e] + bias : kLowest;
  // A maximum of numbers that are all NaN, or absent, is harmless: the powers are NaN, or zero.
  const float largest = over_group(logit, group, [](float a, float b) { return a < b ? b : a; });
  const float power = mine ? exponential(logit - largest) : 0.0f;
  bool selected = true;
  float counted = power;
  if (top_k < experts) {
    if (mine) z[e] = logit;
    sync_warp();
    const std::int32_t key = rank_key(logit);
    int rank = 0;
    if (mine)
      for (int f = 0; f < experts; ++f) {
        const std::int32_t other = rank_key(z[f]);
        rank += other > key || (other == key && f < e);
      }
    selected = rank < top_k;
    if (problem.renormalize && !selected) counted = 0.0f;
  }
  const float sum = sum_over_group(counted, group);
  if (!mine) return;
  const float p = power / sum, gate = selected ? p : 0.0f;
  g[e] = s * gate;
  gates[e] = gate;
  if (probs != nullptr) probs[e] = p;
}

// g = route(z). `z` (E) lies in shared memory, where `g` receives s g; g itself goes to `gates` and the full softmax, where not null, to
// `probs`, in global memory.
STEER_DEVICE void route(const Problem& problem, float s, const float* z, float* g, float* gates, float* probs) {
  const int lane = thread_index() % kWarpSize, experts = static_cast<int>(problem.experts), top_k = static_cast<int>(problem.top_k);
  constexpr float kLowest = -__builtin_huge_valf();
  float powers[kPerLane];
  float largest = kLowest;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    powers[j] = 0.0f;
    const int e = lane + j * kWarpSize;
    if (e < experts) {
      powers[j] = z[e];
      largest = largest < z[e] ? z[e] : largest;
    }
  }
  largest = max_over_warp(largest);
  float sum = 0.0f;
#pragma unroll
  for (int j = 0; j < kPerLane; ++j)
    if (lane + j * kWarpSize < experts) {
      powers[j] = exponential(powers[j] - largest);
      sum += powers[j];
    }

  std::uint32_t selected = 0xffffffffu;  // one bit for each of this lane's experts
  if (top_k < experts) {
    selected = 0;
    std::int32_t keys[kPerLane];
    int ranks[kPerLane];
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int e = lane + j * kWarpSize;
      keys[j] = e < experts ? rank_key(z[e]) : 0;
      ranks[j] = 0;
    }
    for (int f = 0; f < experts; ++f) {
      const std::int32_t key = rank_key(z[f]);
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        if (j * kWarpSize >= experts) break;
        ranks[j] += key > keys[j] || (key == keys[j] && f < lane + j * kWarpSize);
      }
    }
#pragma unroll
    for (int j = 0; j < kPerLane; ++j)
      if (ranks[j] < top_k) selected |= 1u << j;
    if (problem.renormalize) {
      sum = 0.0f;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j)
        if (lane + j * kWarpSize < experts && (selected >> j & 1u)) sum += powers[j];
    }
  }
  sum = sum_over_warp(sum);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int e = lane + j * kWarpSize;
    if (e < experts) {
      const float p = powers[j] / sum, gate = (selected >> j & 1u) ? p : 0.0f;
      g[e] = s * gate;
      gates[e] = gate;
      if (probs != nullptr) probs[e] = p;
    }
  }
}

// dz = g (dg - sum_e g dg) with dg = s a + dg_ext, for gates that are not renormalised with the full softmax in g's place and no gradient
// off the selection. `a` and `g` lie in shared memory, `dgates` and `probs` (null: none) in global memory. `emit(e, dz, g a)` takes the
// results.
template <typename Emit>
STEER_DEVICE void route_backward(int experts, float s, const float* a, const float* g, const float* dgates, const float* probs, Emit emit) {
  const int lane = thread_index() % kWarpSize;
  float sum = 0.0f;
  float dg[kPerLane], p[kPerLane];
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int e = lane + j * kWarpSize;
    dg[j] = p[j] = 0.0f;
    if (e >= experts) continue;
    p[j] = g[e];
    dg[j] = s * a[e];
    if (dgates != nullptr) dg[j] += dgates[e];
    if (probs != nullptr) {
      p[j] = probs[e];
      if (g[e] == 0.0f) dg[j] = 0.0f;
    }
    sum += p[j] * dg[j];
  }
  sum = sum_over_warp(sum);
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    const int e = lane + j * kWarpSize;
    if (e < experts) emit(e, p[j] * (dg[j] - sum), g[e] * a[e]);
  }
}

// The same of a group's frame, up to 32 experts: a lane's dz; `ga` receives its g a. Lanes without a frame get zeros.
STEER_DEVICE float route_group_backward(int experts, int group, bool there, float s, const float* a, const float* g, const float* dgates,
                                        const float* probs, float& ga) {
  const int e = thread_index() % group;
  float dg = 0.0f, p = 0.0f;
  ga = 0.0f;
  if (there && e < experts) {
    p = g[e];
    ga = p * a[e];
    dg = s * a[e];
    if (dgates != nullptr) dg += dgates[e];
    if (probs != nullptr) {
      if (p == 0.0f) dg = 0.0f;
      p = probs[e];
    }
  }
  return p * (dg - sum_over_group(p * dg, group));
}

}  // namespace steer::cuda
