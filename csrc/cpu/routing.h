// Gates from logits, and the gradient back through them, one frame at a time: E numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <type_traits>

#include "../steer.h"
#include "vector.h"

namespace steer::cpu::STEER_NAMESPACE {

// x[i] = exp(x[i]) for x <= 0, without branches, so that the compiler makes whole registers of it. With x = n ln 2 + t, |t| <= ln 2 / 2:
// exp(x) = 2^n exp(t), exp(t) by Taylor's polynomial of degree 7, whose remainder is below a tenth of a unit in the last place. What would
// be subnormal in float is zero: multiplying by subnormal gates takes a hundred times as long.
inline void exponentials(float* x, std::int64_t count) {
  constexpr float kSmallest = -87.3f;          // 2^-126 = exp(-87.34)
  constexpr float kRounder = 0x1.8p23f;        // adding it rounds to an integer, which then are the low bits
  constexpr float kLn2 = 0x1.62ep-1f;          // its 12 bits times n are exact
  constexpr float kLn2Rest = 0x1.0bfbe8p-15f;  // ln 2 - kLn2
  for (std::int64_t i = 0; i < count; ++i) {
    const float v = x[i] < kSmallest ? kSmallest : x[i];  // NaN stays
    const float shifted = v * 0x1.715476p0f + kRounder, n = shifted - kRounder;
    const float t = (v - n * kLn2) - n * kLn2Rest;
    float p = 1.0f / 5040;
    p = p * t + 1.0f / 720;
    p = p * t + 1.0f / 120;
    p = p * t + 1.0f / 24;
    p = p * t + 1.0f / 6;
    p = p * t + 0.5f;
    p = p * t * t + t;
    const float power = bits_to_float((float_to_bits(shifted) + 127u) << 23);
    x[i] = x[i] < kSmallest ? 0.0f : p * power + power;
  }
}
inline void exponentials(double* x, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) x[i] = std::exp(x[i]);
}

// work(experts), with eight of them as a constant: loops of eight known steps are a few instructions, others mostly their own preparation.
template <typename Work>
[[gnu::always_inline]] inline void with_experts(std::int64_t experts, Work&& work) {
  if (experts == 8)
    work(std::integral_constant<std::int64_t, 8>());
  else
    work(experts);
}

// p = softmax(z), `rows` of them, one after another.
template <typename C, typename Count>
[[gnu::always_inline]] inline void softmax_rows(const C* z, std::int64_t rows, Count experts, C* p) {
  for (std::int64_t r = 0; r < rows; ++r) {
    const C* logits = z + r * experts;
    C largest = logits[0];
#pragma omp simd reduction(max : largest)
    for (std::int64_t e = 1; e < experts; ++e) largest = std::max(largest, logits[e]);
    for (std::int64_t e = 0; e < experts; ++e) p[r * experts + e] = logits[e] - largest;
  }
  exponentials(p, rows * experts);
  for (std::int64_t r = 0; r < rows; ++r, p += experts) {
    double sum = 0;  // long chains of additions are what the gates' accuracy hangs on
#pragma omp simd reduction(+ : sum)
    for (std::int64_t e = 0; e < experts; ++e) sum += p[e];
    const C total = static_cast<C>(sum);
    for (std::int64_t e = 0; e < experts; ++e) p[e] /= total;
  }
}

#if defined(__AVX512F__)

// Every eight lanes' fold, in each of them.
template <typename Fold>
inline __m512 fold_eights(__m512 v, Fold fold) {
  v = fold(v, _mm512_shuffle_f32x4(v, v, _MM_SHUFFLE(2, 3, 0, 1)));
  v = fold(v, _mm512_permute_ps(v, 0x4e));
  return fold(v, _mm512_permute_ps(v, 0xb1));
}

// The same for eight experts, two rows a register.
inline void softmax_of_eight(const float* z, std::int64_t rows, float* p) {
  const std::int64_t count = 8 * rows;
  const auto each = [count](auto work) {
    for (std::int64_t i = 0; i < count; i += 16) work(i, static_cast<__mmask16>(count - i < 16 ? 0x00ff : 0xffff));
  };
  each([&](std::int64_t i, __mmask16 there) {
    const __m512 logits = _mm512_maskz_loadu_ps(there, z + i);
    const __m512 largest = fold_eights(logits, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); });
    _mm512_mask_storeu_ps(p + i, there, _mm512_sub_ps(logits, largest));
  });
  exponentials(p, count);
  each([&](std::int64_t i, __mmask16 there) {
    const __m512 powers = _mm512_maskz_loadu_ps(there, p + i);
    const __m512 sum = fold_eights(powers, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); });
    _mm512_mask_storeu_ps(p + i, there, _mm512_maskz_div_ps(there, powers, sum));
  });
}

#endif

template <typename C>
inline void softmax(const C* z, std::int64_t rows, std::int64_t experts, C* p) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<C, float>)
    if (experts == 8) return softmax_of_eight(z, rows, p);
#endif
  with_experts(experts, [&](auto count) { softmax_rows(z, rows, count, p); });
}

// Puts the indices of the top_k largest logits first in `order`. Of equal logits the lowest index wins; NaN counts as the largest.
template <typename C>
inline void select_top_k(const C* z, std::int64_t experts, std::int64_t top_k, std::int32_t* order) {
  std::iota(order, order + experts, 0);
  std::nth_element(order, order + top_k - 1, order + experts, [z](std::int32_t i, std::int32_t j) {
    const bool i_nan = std::isnan(z[i]), j_nan = std::isnan(z[j]);
    if (i_nan != j_nan) return i_nan;
    if (!i_nan && z[i] != z[j]) return z[i] > z[j];
    return i < j;
  });
}

// g = route(z) where experts are selected. `probs` receives the full softmax where the gates are not renormalised, and may be null where
// they are; `order` (E) and `selected` (E) are scratch.
template <typename C>
inline void route_selected(const C* z, const Problem& problem, C* g, C* probs, std::int32_t* order, C* selected) {
  const std::int64_t experts = problem.experts, k = problem.top_k;
  select_top_k(z, experts, k, order);
  std::fill(g, g + experts, C(0));
  if (problem.renormalize) {
    std::sort(order, order + k);  // sum in the order of the experts, whatever their rank
    for (std::int64_t i = 0; i < k; ++i) selected[i] = z[order[i]];
    softmax(selected, 1, k, selected);
    for (std::int64_t i = 0; i < k; ++i) g[order[i]] = selected[i];
  } else {
    softmax(z, 1, experts, probs);
    for (std::int64_t i = 0; i < k; ++i) g[order[i]] = probs[order[i]];
  }
}

// dz = p (dg - sum_e p dg), `rows` of them. p are the gates g; where these are not renormalised, the full softmax, with no gradient off the
// selection. `dg` (rows, E) is overwritten.
template <typename C, typename Count>
[[gnu::always_inline]] inline void route_backward(const C* g, const C* probs, C* dg, std::int64_t rows, Count experts, C* dz) {
  const C* p = g;
  if (probs != nullptr) {
    p = probs;
    for (std::int64_t i = 0; i < rows * experts; ++i)
      if (g[i] == C(0)) dg[i] = 0;
  }
  for (std::int64_t r = 0; r < rows; ++r, p += experts, dg += experts, dz += experts) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (std::int64_t e = 0; e < experts; ++e) sum += static_cast<double>(p[e]) * dg[e];
    const C mean = static_cast<C>(sum);
    for (std::int64_t e = 0; e < experts; ++e) dz[e] = p[e] * (dg[e] - mean);
  }
}

}  // namespace steer::cpu::STEER_NAMESPACE
