// SPDX-License-Identifier: MIT
// The gate for SIMD engines, a template over `O`: the operations of score.h on O::kLanes floats,
// plus loads, integer keys and the candidate scan. Included by the ISA files only.
//
//   row ----> z --score--> s[E] --bias--> c --order--> key[E]     one pass, kLanes experts a step
//                                             |
//   lane maxima (kBound of them: expert e belongs to lane e % kBound)
//                                             v
//   bound = K-th largest lane maximum: at least K experts reach it, about 1.4 K do
//   candidates = ids with key >= bound   --rank by (key, id)-->   indices[K]
//
// The rank of a candidate is the number of better ones, so no sort and no branch is needed. More
// than kMaxCandidates (adversarial rows: K rounds of arg-max) is slow but exact. The bound decides
// which ids are looked at, never the result.
#pragma once

#include <stdint.h>
#include <string.h>

#include "topk_gate/score.h"
#include "topk_gate/topk_gate.h"

namespace kimi::gate {
namespace {  // every ISA file must have its own copy: nothing here may be merged by the linker

constexpr int kMaxExperts = KIMI_TOPK_GATE_MAX_EXPERTS, kMaxTopK = KIMI_TOPK_GATE_MAX_K;
constexpr int kMaxCandidates = 64;
constexpr float kMaxFloat = 3.40282346638528859811704183484516925e+38f;

template <class O, kimi_score_function kFunction>
typename O::F score_of(typename O::F z) {
  if constexpr (kFunction == KIMI_SCORE_SIGMOID) return sigmoid<O>(z);
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
    const F numerator = softmax_numerator<O>(O::load_all(s + e), peak);
    partial[e / kLanes % kParts] = O::add(partial[e / kLanes % kParts], numerator);
    O::store(s + e, numerator);
  }
  alignas(64) float sum[32];
  for (int i = 0; i < kParts; ++i) O::store(sum + i * kLanes, partial[i]);
  for (int half = 16; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) sum[l] += sum[l + half];
  const F scale = O::set(sum[0] > 0.0f ? 1.0f / sum[0] : 0.0f);
  for (int e = 0; e < num_experts; e += kLanes)
    O::store(s + e, O::mul(O::load_all(s + e), scale));
}

// The K-th largest of `lanes` [kBound]: the least value that fewer than K others exceed.
template <class O, int kBound>
int32_t kth_largest(const int32_t* lanes, int k) {
  using I = typename O::I;
  constexpr int kVectors = kBound / O::kLanes;
  I value[kVectors], above[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    value[v] = O::load_int(lanes + v * O::kLanes);
    above[v] = O::set_int(0);
  }
  for (int l = 0; l < kBound; ++l) {
    const I other = O::set_int(lanes[l]);
    for (int v = 0; v < kVectors; ++v) above[v] = O::count_greater(above[v], other, value[v]);
  }
  I least = O::set_int(INT32_MAX);
  for (int v = 0; v < kVectors; ++v)
    least = O::min_int(least, O::select_less_int(above[v], O::set_int(k), value[v], least));
  return O::reduce_min_int(least);
}

// best[0..k) = ids of the k largest keys, descending, lower id first among equals.
inline void arg_max_rounds(int32_t* key, int num_experts, int k, int32_t* best) {
  for (int j = 0; j < k; ++j) {
    int top = 0;
    for (int e = 1; e < num_experts; ++e)
      if (key[e] > key[top]) top = e;
    key[top] = kExcluded;
    best[j] = top;
  }
}

template <class O, int kBound>
void select(int32_t* key, int num_experts, int k, int32_t* best) {
  constexpr int kVectors = kBound / O::kLanes;
  typename O::I top[kVectors];
  for (int v = 0; v < kVectors; ++v) top[v] = O::set_int(kExcluded);
  int e = 0;
  for (; e + kBound <= num_experts; e += kBound)
    for (int v = 0; v < kVectors; ++v)
      top[v] = O::max_int(top[v], O::load_int(key + e + v * O::kLanes));
  for (int v = 0; e < num_experts; e += O::kLanes, ++v)  // key is padded with kExcluded
    top[v] = O::max_int(top[v], O::load_int(key + e));
  alignas(64) int32_t lanes[kBound];
  for (int v = 0; v < kVectors; ++v) O::store_int(lanes + v * O::kLanes, top[v]);
  int32_t bound = kth_largest<O, kBound>(lanes, k);
  if (bound == kExcluded) bound = kExcluded + 1;  // fewer than K lanes hold a candidate

  int32_t candidates[kMaxExperts + O::kLanes];
  const int count = O::collect(key, num_experts, bound, candidates);
  if (count < k || count > kMaxCandidates) return arg_max_rounds(key, num_experts, k, best);
  // (key, ~id) as one signed number: greater is better, and no two are equal.
  alignas(64) int64_t order[kMaxCandidates + 8];
  alignas(64) int32_t rank[kMaxCandidates + 8], ranked[kMaxCandidates];
  for (int i = 0; i < count; ++i)
    order[i] = int64_t(uint64_t(uint32_t(key[candidates[i]])) << 32 | uint32_t(~candidates[i]));
  O::rank_descending(order, count, rank);
  for (int i = 0; i < count; ++i) ranked[rank[i]] = candidates[i];
  memcpy(best, ranked, sizeof(int32_t) * k);
}

template <class O, class T, kimi_score_function kFunction, int kBound>
void forward_rows(const TopkGateParams& p, int64_t begin, int64_t end, int32_t* counts) {
  using F = typename O::F;
  const int experts = p.num_experts, k = p.top_k;
  alignas(64) float s[kMaxExperts + O::kLanes], choice[kMaxExperts + O::kLanes];
  alignas(64) int32_t key[kMaxExperts + O::kLanes];
  const F lowest = O::set(-__builtin_inff());
  for (int64_t t = begin; t < end; ++t) {
    float* weights = p.weights + t * k;
    int32_t* indices = p.indices + t * k;
    if (p.valid && !p.valid[t]) {
      for (int j = 0; j < k; ++j) weights[j] = 0.0f, indices[j] = -1;
      continue;
    }
    const T* logits = static_cast<const T*>(p.logits) + t * p.logits_stride;
    if constexpr (kFunction == KIMI_SCORE_SOFTMAX)
      score_row<O, T, kFunction>(logits, experts, s);
    for (int e = 0; e < experts; e += O::kLanes) {
      const int left = experts - e;
      const F z = O::load(logits + e, left);
      F score;
      if constexpr (kFunction == KIMI_SCORE_SOFTMAX) {
        score = O::load_all(s + e);
      } else {
        score = score_of<O, kFunction>(clean<O>(z));
        O::store(s + e, score);
      }
      F c = p.expert_bias ? O::add(score, O::load(p.expert_bias + e, left)) : score;
      c = O::select(O::is_nan(z), lowest, O::select(O::is_nan(c), lowest, c));
      if (p.num_groups > 1) O::store(choice + e, c);
      O::store_int(key + e, O::keep_first(O::sort_keys(c), left, kExcluded));
    }
    exclude_groups(p, choice, key);
    select<O, kBound>(key, experts, k, indices);

    float total = 0.0f;
    for (int j = 0; j < k; ++j) {
      weights[j] = s[indices[j]];
      total += weights[j];
      ++counts[indices[j]];
    }
    const float scale =
        p.renormalize ? p.scaling_factor / (total + KIMI_TOPK_GATE_EPSILON) : p.scaling_factor;
    for (int j = 0; j < k; ++j) weights[j] *= scale;
  }
}

template <class O, class T, kimi_score_function kFunction>
void backward_rows(const TopkGateBackwardParams& p, int64_t begin, int64_t end) {
  using F = typename O::F;
  const int experts = p.num_experts, k = p.top_k;
  alignas(64) float s[kMaxExperts + O::kLanes], du[kMaxExperts + O::kLanes];
  alignas(64) float z[kMaxTopK + O::kLanes], u[kMaxTopK + O::kLanes], d[kMaxTopK + O::kLanes];
  memset(du, 0, sizeof du);
  memset(z, 0, sizeof z);
  memset(d, 0, sizeof d);
  for (int64_t t = begin; t < end; ++t) {
    const T* logits = static_cast<const T*>(p.logits) + t * p.logits_stride;
    const float* g = p.grad_weights + t * k;
    const int32_t* indices = p.indices + t * k;
    T* grad = static_cast<T*>(p.grad_logits) + t * experts;
    if (indices[0] < 0 || kFunction != KIMI_SCORE_SOFTMAX) memset(grad, 0, sizeof(T) * experts);
    if (indices[0] < 0) continue;
    if constexpr (kFunction == KIMI_SCORE_SOFTMAX) {
      score_row<O, T, kFunction>(logits, experts, s);
      for (int j = 0; j < k; ++j) u[j] = s[indices[j]];
    } else {
      for (int j = 0; j < k; ++j) z[j] = to_float(logits[indices[j]]);
      for (int j = 0; j < k; j += O::kLanes)
        O::store(u + j, score_of<O, kFunction>(clean<O>(O::load_all(z + j))));
    }
    float total = 0.0f, dot = 0.0f, flow = 0.0f;
    for (int j = 0; j < k; ++j) {
      total += u[j];
      dot = __builtin_fmaf(g[j], u[j], dot);
    }
    const float inverse = 1.0f / (total + KIMI_TOPK_GATE_EPSILON);
    const float scale = p.renormalize ? p.scaling_factor * inverse : p.scaling_factor;
    const float mean = p.renormalize ? dot * inverse : 0.0f;
    for (int j = 0; j < k; ++j) {
      d[j] = (g[j] - mean) * scale;
      flow = __builtin_fmaf(d[j], u[j], flow);
    }
    if constexpr (kFunction == KIMI_SCORE_SOFTMAX) {
      for (int j = 0; j < k; ++j) du[indices[j]] = d[j];
      for (int e = 0; e < experts; e += O::kLanes)
        O::store_as(grad + e, experts - e,
                    O::mul(O::load_all(s + e), O::sub(O::load_all(du + e), O::set(flow))));
      for (int j = 0; j < k; ++j) du[indices[j]] = 0.0f;
    } else {
      for (int j = 0; j < k; j += O::kLanes) {
        const F uj = O::load_all(u + j);
        const F slope = kFunction == KIMI_SCORE_SIGMOID
                            ? sigmoid_slope<O>(uj)
                            : sqrtsoftplus_slope<O>(clean<O>(O::load_all(z + j)), uj);
        O::store(u + j, O::mul(O::load_all(d + j), slope));
      }
      for (int j = 0; j < k; ++j) grad[indices[j]] = from_float<T>(u[j]);
    }
  }
}

// visit<T, kFunction>() for the runtime dtype and score function.
template <class Visitor>
void dispatch_gate(kimi_dtype dtype, kimi_score_function function, const Visitor& visit) {
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

template <class O>
void forward(const TopkGateParams& p, int64_t begin, int64_t end, int32_t* counts) {
  dispatch_gate(p.logits_dtype, p.score_function, [&]<class T, kimi_score_function kFunction>() {
    // Twice as many lanes as K keep the candidates few: 11 of 384 at K = 8, 22 at K = 16.
    if (p.top_k <= 8) return forward_rows<O, T, kFunction, 16>(p, begin, end, counts);
    if (p.top_k <= 16) return forward_rows<O, T, kFunction, 32>(p, begin, end, counts);
    return forward_rows<O, T, kFunction, 64>(p, begin, end, counts);
  });
}

template <class O>
void backward(const TopkGateBackwardParams& p, int64_t begin, int64_t end) {
  dispatch_gate(p.logits_dtype, p.score_function, [&]<class T, kimi_score_function kFunction>() {
    backward_rows<O, T, kFunction>(p, begin, end);
  });
}

}  // namespace
}  // namespace kimi::gate
