// SPDX-License-Identifier: MIT
// The scores of a row for SIMD engines, a template over `O`, the vectors of cpu/vec_*.h. Included
// by the ISA files only.
#pragma once

#include <stdint.h>
#include <string.h>

#include "topk_gate/score.h"

namespace kimi::gate {
namespace {  // every ISA file must have its own copy: nothing here may be merged by the linker

constexpr int kMaxExperts = KIMI_TOPK_GATE_MAX_EXPERTS;

template <class O, kimi_score_function kFunction>
typename O::F score_of(typename O::F z) {
  if constexpr (kFunction == KIMI_SCORE_SIGMOID) return math::sigmoid<O>(z);
  return sqrtsoftplus<O>(z);
}

// Scores of one row into s [E rounded up to kLanes]. Lanes past E hold a finite value.
template <class O, class T, kimi_score_function kFunction>
void score_row(const T* logits, int num_experts, float* s) {
  using F = typename O::F;
  constexpr int kLanes = O::kLanes;
  if constexpr (kFunction != KIMI_SCORE_SOFTMAX) {
    for (int e = 0; e < num_experts; e += kLanes)
      O::store(s + e, score_of<O, kFunction>(clean<O>(O::load(logits + e, num_experts - e))));
    return;
  }
  constexpr int kParts = 32 / kLanes;
  F peak = O::set(-kMaxFloat), partial[kParts];
  for (int i = 0; i < kParts; ++i) partial[i] = O::set(0.0f);
  for (int e = 0; e < num_experts; e += kLanes) {
    const F z = clean<O>(O::load_or(logits + e, num_experts - e, -__builtin_inff()));
    peak = O::max(peak, z);
    O::store(s + e, z);
  }
  peak = O::set(O::reduce_max(peak));
  for (int e = 0; e < num_experts; e += kLanes) {
    const F numerator = softmax_numerator<O>(O::load(s + e), peak);
    partial[e / kLanes % kParts] = O::add(partial[e / kLanes % kParts], numerator);
    O::store(s + e, numerator);
  }
  alignas(64) float sum[32];
  for (int i = 0; i < kParts; ++i) O::store(sum + i * kLanes, partial[i]);
  for (int half = 16; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) sum[l] += sum[l + half];
  const F scale = O::set(sum[0] > 0.0f ? 1.0f / sum[0] : 0.0f);
  for (int e = 0; e < num_experts; e += kLanes) O::store(s + e, O::mul(O::load(s + e), scale));
}

// visit<T, kFunction>() for the runtime dtype and score function.
template <class Visitor>
void dispatch_score(kimi_dtype dtype, kimi_score_function function, const Visitor& visit) {
  dispatch(dtype, [&]<class T>() {
    switch (function) {
      case KIMI_SCORE_SOFTMAX:
        return visit.template operator()<T, KIMI_SCORE_SOFTMAX>();
      case KIMI_SCORE_SQRTSOFTPLUS:
        return visit.template operator()<T, KIMI_SCORE_SQRTSOFTPLUS>();
      default:
        return visit.template operator()<T, KIMI_SCORE_SIGMOID>();
    }
  });
}

}  // namespace
}  // namespace kimi::gate
