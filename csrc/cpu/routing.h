// Gates from logits, and the gradient back through them, one frame at a time: E numbers.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>

#include "../steer.h"

namespace steer::cpu::STEER_NAMESPACE {

// p = softmax(z)
template <typename C>
inline void softmax(const C* z, std::int64_t experts, C* p) {
  C largest = z[0];
  for (std::int64_t e = 1; e < experts; ++e) largest = std::max(largest, z[e]);
  double sum = 0;  // long chains of additions are what the gates' accuracy hangs on
  for (std::int64_t e = 0; e < experts; ++e) {
    p[e] = std::exp(z[e] - largest);
    sum += p[e];
  }
  const C total = static_cast<C>(sum);
  for (std::int64_t e = 0; e < experts; ++e) p[e] /= total;
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

// g = route(z); `probs`, where not null, receives the full softmax. `order` (E) and `selected` (E) are scratch.
template <typename C>
inline void route(const C* z, const Problem& problem, C* g, C* probs, std::int32_t* order, C* selected) {
  const std::int64_t experts = problem.experts, k = problem.top_k;
  if (problem.dense()) {
    softmax(z, experts, g);
    return;
  }
  select_top_k(z, experts, k, order);
  std::fill(g, g + experts, C(0));
  if (problem.renormalize) {
    std::sort(order, order + k);  // sum in the order of the experts, whatever their rank
    for (std::int64_t i = 0; i < k; ++i) selected[i] = z[order[i]];
    softmax(selected, k, selected);
    for (std::int64_t i = 0; i < k; ++i) g[order[i]] = selected[i];
  } else {
    softmax(z, experts, probs);
    for (std::int64_t i = 0; i < k; ++i) g[order[i]] = probs[order[i]];
  }
}

// dz = g (dg - sum_e g dg), for gates that are not renormalised with the full softmax in g's place and no gradient off the selection.
// `dg` (E) is overwritten.
template <typename C>
inline void route_backward(const C* g, const C* probs, C* dg, std::int64_t experts, C* dz) {
  const C* p = g;
  if (probs != nullptr) {
    p = probs;
    for (std::int64_t e = 0; e < experts; ++e)
      if (g[e] == C(0)) dg[e] = 0;
  }
  double sum = 0;
  for (std::int64_t e = 0; e < experts; ++e) sum += static_cast<double>(p[e]) * dg[e];
  const C mean = static_cast<C>(sum);
  for (std::int64_t e = 0; e < experts; ++e) dz[e] = p[e] * (dg[e] - mean);
}

}  // namespace steer::cpu::STEER_NAMESPACE
