// SPDX-License-Identifier: MIT
// The scores of a row in plain loops. Included by the portable engines only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>

#include "cpu/vec_portable.h"
#include "topk_gate/score.h"

namespace kimi::gate {
namespace {

using cpu::Portable;

constexpr int kMaxExperts = KIMI_TOPK_GATE_MAX_EXPERTS;

// Scores of one row; for softmax the exponentials' fixed summation order is that of score.h.
template <class T>
void score_row(const T* logits, int num_experts, kimi_score_function function, float* s) {
  if (function != KIMI_SCORE_SOFTMAX) {
    for (int e = 0; e < num_experts; ++e) {
      const float z = clean<Portable>(to_float(logits[e]));
      s[e] =
          function == KIMI_SCORE_SIGMOID ? math::sigmoid<Portable>(z) : sqrtsoftplus<Portable>(z);
    }
    return;
  }
  float peak = -std::numeric_limits<float>::max(), partial[32] = {};
  for (int e = 0; e < num_experts; ++e) peak = std::max(peak, clean<Portable>(to_float(logits[e])));
  for (int e = 0; e < num_experts; ++e) {
    s[e] = softmax_numerator<Portable>(clean<Portable>(to_float(logits[e])), peak);
    partial[e % 32] += s[e];
  }
  for (int half = 16; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) partial[l] += partial[l + half];
  const float scale = partial[0] > 0.0f ? 1.0f / partial[0] : 0.0f;
  for (int e = 0; e < num_experts; ++e) s[e] *= scale;
}

}  // namespace
}  // namespace kimi::gate
