// Gates from logits, and the gradient back through them, some rows of E numbers at a time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <type_traits>

#include "../steer.h"
#include "vector.h"

namespace steer::cpu::STEER_NAMESPACE {

// x[i] = exp(x[i]) for x <= 0, without branches, so that the compiler makes whole registers of it. With x = n ln 2 + t, |t| <= ln 2 / 2:
// exp(x) = 2^n exp(t), exp(t) by Taylor's polynomial of degree 7, whose remainder is below a tenth of a unit in the last place. What would
// be subnormal in float is zero: multiplying by subnormal gates is far slower.
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

// Out of line: the same instructions add up every row then. Where the compiler knows how many rows there are, it adds up in another order
// for one than for several, and which rows come together depends on the number of threads where frames are pooled.
template <typename C>
[[gnu::noinline]] C sum_of(const C* p, std::int64_t count) {
  double sum = 0;  // long chains of additions are what the gates' accuracy hangs on
#pragma omp simd reduction(+ : sum)
  for (std::int64_t i = 0; i < count; ++i) sum += p[i];
  return static_cast<C>(sum);
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
    const C total = sum_of<C>(p, experts);
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

// z + b of eight experts, two rows a register. Dot products leave four numbers at a time, and a register that is loaded across those waits
// until they have left the store queue, in which they come after the stream's: they are taken up as they were put down.
inline void add_bias_of_eight(float* z, const float* b, std::int64_t rows) {
  const auto join = [](const float* from) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from)), _mm_loadu_ps(from + 4), 1);
  };
  const __m256 bias = b == nullptr ? _mm256_setzero_ps() : _mm256_loadu_ps(b);
  std::int64_t r = 0;
  for (; r + 2 <= rows; r += 2, z += 16)
    _mm512_storeu_ps(z, _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_add_ps(join(z), bias)), _mm256_add_ps(join(z + 8), bias), 1));
  if (r < rows) _mm256_storeu_ps(z, _mm256_add_ps(join(z), bias));
}

// The softmax of two rows of eight experts.
inline __m512 softmax_of_pair(__m512 logits) {
  const __m512 largest = fold_eights(logits, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); });
  alignas(64) float lanes[16];
  _mm512_store_ps(lanes, _mm512_sub_ps(logits, largest));
  exponentials(lanes, 16);
  const __m512 powers = _mm512_load_ps(lanes);
  return _mm512_div_ps(powers, fold_eights(powers, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); }));
}

// The same as softmax_rows for eight experts, two rows a register.
inline void softmax_of_eight(const float* z, std::int64_t rows, float* p) {
  std::int64_t r = 0;
  for (; r + 2 <= rows; r += 2, z += 16, p += 16) _mm512_storeu_ps(p, softmax_of_pair(_mm512_loadu_ps(z)));
  if (r < rows) _mm256_storeu_ps(p, _mm512_castps512_ps256(softmax_of_pair(_mm512_broadcast_f32x8(_mm256_loadu_ps(z)))));
}

#endif

// z += b, of `rows` rows; b may be null. Of eight experts the numbers are joined into registers even then.
template <typename C>
inline void add_bias(C* z, const C* b, std::int64_t rows, std::int64_t experts) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<C, float>)
    if (experts == 8) return add_bias_of_eight(z, b, rows);
#endif
  if (b == nullptr) return;
  with_experts(experts, [&](auto count) {
    for (std::int64_t r = 0; r < rows; ++r, z += count)
      for (std::int64_t e = 0; e < count; ++e) z[e] += b[e];
  });
}

// p = softmax(z), which may be in the same place.
template <typename C>
inline void softmax(const C* z, std::int64_t rows, std::int64_t experts, C* p) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<C, float>)
    if (experts == 8) return softmax_of_eight(z, rows, p);
#endif
  with_experts(experts, [&](auto count) { softmax_rows(z, rows, count, p); });
}

// An integer as wide as C, for loops over both.
template <typename C>
using Integer = std::conditional_t<sizeof(C) == 4, std::int32_t, std::int64_t>;

// Integers in the order of the numbers: NaN above all, and both zeros alike.
template <typename C>
inline Integer<C> ordered(C value) {
  const C positive_zero = value + C(0);
  Integer<C> bits;
  std::memcpy(&bits, &positive_zero, sizeof(bits));
  constexpr Integer<C> kLargest = std::numeric_limits<Integer<C>>::max();
  return value != value ? kLargest : bits ^ (bits < 0 ? kLargest : 0);
}

// chosen[e] = whether logit e is among the top_k largest ones. Of equal logits the lowest index wins; NaN counts as the largest. `keys`,
// and where there are many experts `others`, are scratch.
template <typename C, typename Count>
[[gnu::always_inline]] inline void select_top_k(const C* z, Count experts, Integer<C> top_k, Integer<C>* keys, Integer<C>* others,
                                                Integer<C>* chosen) {
  constexpr std::int64_t kFew = 64;
  const Integer<C> E = static_cast<Integer<C>>(experts);
  for (Integer<C> e = 0; e < E; ++e) keys[e] = ordered(z[e]);
  if (experts <= kFew) {
    // How many come before each one: each is compared with each, without branches, whole registers at once.
    for (Integer<C> e = 0; e < E; ++e) chosen[e] = 0;
    for (Integer<C> j = 0; j < E; ++j) {
      const Integer<C> key = keys[j];
      for (Integer<C> e = 0; e < E; ++e) chosen[e] += key > keys[e] - (j < e ? 1 : 0) ? 1 : 0;
    }
    for (Integer<C> e = 0; e < E; ++e) chosen[e] = chosen[e] < top_k ? 1 : 0;
    return;
  }
  std::copy_n(keys, E, others);
  std::nth_element(others, others + top_k - 1, others + E, std::greater<Integer<C>>());
  const Integer<C> last = others[top_k - 1];
  Integer<C> left = top_k;  // for those that equal the last one
  for (Integer<C> e = 0; e < E; ++e) left -= keys[e] > last ? 1 : 0;
  for (Integer<C> e = 0; e < E; ++e) chosen[e] = keys[e] > last || (keys[e] == last && left-- > 0) ? 1 : 0;
}

// g = route(z) where experts are selected, `rows` rows. `probs` receives the full softmax where the gates are not renormalised, and may be
// null where they are; `scratch` is for select_top_k's keys and others and the rows' chosen, (rows + 2, E).
template <typename C>
inline void route_selected(const C* z, const Problem& problem, std::int64_t rows, C* g, C* probs, Integer<C>* scratch) {
  const std::int64_t experts = problem.experts, numbers = rows * experts;
  const Integer<C> k = static_cast<Integer<C>>(problem.top_k);
  Integer<C>* const chosen = scratch + 2 * experts;
  with_experts(experts, [&](auto count) {
    for (std::int64_t r = 0; r < rows; ++r) select_top_k(z + r * count, count, k, scratch, scratch + count, chosen + r * count);
  });
  const C* gates = problem.renormalize ? g : probs;
  if (problem.renormalize) {
    for (std::int64_t i = 0; i < numbers; ++i) g[i] = chosen[i] ? z[i] : -std::numeric_limits<C>::infinity();
    softmax(g, rows, experts, g);
  } else {
    softmax(z, rows, experts, probs);
  }
  for (std::int64_t i = 0; i < numbers; ++i) g[i] = chosen[i] ? gates[i] : C(0);  // where a frame has a NaN, too
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
