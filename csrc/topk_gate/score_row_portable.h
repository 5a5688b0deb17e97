// SPDX-License-Identifier: MIT
// The operations of score.h on one float, and the scores of a row in plain loops. Included by the
// portable engines only.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "topk_gate/score.h"

namespace kimi::gate {
namespace {

constexpr int kMaxExperts = KIMI_TOPK_GATE_MAX_EXPERTS;

struct ScalarOps {
  using F = float;
  static F set(float x) { return x; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F fma(F a, F b, F c) { return std::fma(a, b, c); }
  static F sqrt(F a) { return std::sqrt(a); }
  static F reciprocal(F a) { return reciprocal_by_division<ScalarOps>(a); }
  static F neg_abs(F a) { return -std::fabs(a); }
  static F min_finite(F a) { return std::min(a, std::numeric_limits<float>::max()); }
  static bool is_nan(F a) { return a != a; }
  static bool less(F a, F b) { return a < b; }
  static bool at_least(F a, F b) { return a >= b; }
  static F select(bool condition, F a, F b) { return condition ? a : b; }
  static F scale_by_exponent_or_zero(bool keep, F p, F shifted) {
    return keep ? float_of(bits_of(p) + (bits_of(shifted) << 23)) : 0.0f;
  }
  // x = significand(x) * 2^exponent(x) for normal positive x, the significand in [1, 2).
  static F exponent(F a) { return float(int(bits_of(a) >> 23) - 127); }
  static F significand(F a) { return float_of((bits_of(a) & 0x007fffffu) | 0x3f800000u); }
};

// Scores of one row; for softmax the exponentials' fixed summation order is that of score.h.
template <class T>
void score_row(const T* logits, int num_experts, kimi_score_function function, float* s) {
  if (function != KIMI_SCORE_SOFTMAX) {
    for (int e = 0; e < num_experts; ++e) {
      const float z = clean<ScalarOps>(to_float(logits[e]));
      s[e] = function == KIMI_SCORE_SIGMOID ? sigmoid<ScalarOps>(z) : sqrtsoftplus<ScalarOps>(z);
    }
    return;
  }
  float peak = -std::numeric_limits<float>::max(), partial[32] = {};
  for (int e = 0; e < num_experts; ++e)
    peak = std::max(peak, clean<ScalarOps>(to_float(logits[e])));
  for (int e = 0; e < num_experts; ++e) {
    s[e] = softmax_numerator<ScalarOps>(clean<ScalarOps>(to_float(logits[e])), peak);
    partial[e % 32] += s[e];
  }
  for (int half = 16; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) partial[l] += partial[l + half];
  const float scale = partial[0] > 0.0f ? 1.0f / partial[0] : 0.0f;
  for (int e = 0; e < num_experts; ++e) s[e] *= scale;
}

}  // namespace
}  // namespace kimi::gate
