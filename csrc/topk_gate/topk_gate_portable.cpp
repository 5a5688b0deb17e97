// SPDX-License-Identifier: MIT
// The portable engine: one row after another, plain loops, the definition of topk_gate.h in code.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "topk_gate/score_row_portable.h"
#include "topk_gate/topk_gate.h"

namespace kimi::gate {
namespace {

template <class T>
void forward_rows(const TopkGateParams& p, int64_t begin, int64_t end, int32_t* counts) {
  float s[kMaxExperts], choice[kMaxExperts];
  int32_t key[kMaxExperts];
  for (int64_t t = begin; t < end; ++t) {
    float* weights = p.weights + t * p.top_k;
    int32_t* indices = p.indices + t * p.top_k;
    if (p.valid && !p.valid[t]) {
      std::fill_n(weights, p.top_k, 0.0f);
      std::fill_n(indices, p.top_k, -1);
      continue;
    }
    const T* logits = static_cast<const T*>(p.logits) + t * p.logits_stride;
    score_row(logits, p.num_experts, p.score_function, s);
    for (int e = 0; e < p.num_experts; ++e) {
      const float z = to_float(logits[e]), score = p.select_logits ? clean<Portable>(z) : s[e];
      choice[e] = p.expert_bias ? score + p.expert_bias[e] : score;
      if (z != z || choice[e] != choice[e]) choice[e] = -std::numeric_limits<float>::infinity();
      key[e] = sort_key(choice[e]);
    }
    if (p.num_groups > 1) {
      bool kept[kMaxExperts];
      select_groups(p, choice, kept);
      const int size = p.num_experts / p.num_groups;
      for (int e = 0; e < p.num_experts; ++e)
        if (!kept[e / size]) key[e] = kExcluded;
    }
    for (int j = 0; j < p.top_k; ++j) {
      const int best =
          int(std::max_element(key, key + p.num_experts) - key);  // the first of equals
      key[best] = kExcluded;
      indices[j] = best;
      weights[j] = s[best];
      ++counts[best];
    }
    weigh<Portable>(p, weights);
  }
}

template <class T>
void given_rows(const TopkGateGivenParams& p, int64_t begin, int64_t end, int32_t* counts) {
  float s[kMaxExperts];
  for (int64_t t = begin; t < end; ++t) {
    const bool valid = !p.valid || p.valid[t];
    if (valid)
      score_row(static_cast<const T*>(p.logits) + t * p.logits_stride, p.num_experts,
                p.score_function, s);
    float* weights = p.weights + t * p.top_k;
    for (int j = 0; j < p.top_k; ++j) {
      const int32_t id = p.given[t * p.top_k + j];
      const bool slot = valid && id >= 0 && id < p.num_experts;
      p.indices[t * p.top_k + j] = slot ? id : -1;
      weights[j] = slot ? s[id] : 0.0f;
      if (slot) ++counts[id];
    }
    weigh<Portable>(p, weights);
  }
}

template <class T>
void backward_rows(const TopkGateBackwardParams& p, int64_t begin, int64_t end) {
  float s[kMaxExperts], du[kMaxExperts], g[KIMI_TOPK_GATE_MAX_K];
  int32_t id[KIMI_TOPK_GATE_MAX_K];
  for (int64_t t = begin; t < end; ++t) {
    const T* logits = static_cast<const T*>(p.logits) + t * p.logits_stride;
    T* grad = static_cast<T*>(p.grad_logits) + t * p.num_experts;
    std::fill_n(grad, p.num_experts, T{});
    int k = 0;  // slots that are not dropped; a dropped one would add zeros to every sum
    for (int64_t slot = t * p.top_k; slot < (t + 1) * p.top_k; ++slot) {
      if (p.indices[slot] < 0 || p.indices[slot] >= p.num_experts) continue;
      id[k] = p.indices[slot];
      g[k++] = p.grad_weights[slot];
    }
    if (k == 0) continue;
    score_row(logits, p.num_experts, p.score_function, s);
    float total = 0.0f, dot = 0.0f, flow = 0.0f;
    for (int j = 0; j < k; ++j) {
      total += s[id[j]];
      dot = std::fma(g[j], s[id[j]], dot);
    }
    const float inverse = 1.0f / (total + KIMI_TOPK_GATE_EPSILON);
    const float scale = p.renormalize ? p.scaling_factor * inverse : p.scaling_factor;
    const float mean = p.renormalize ? dot * inverse : 0.0f;
    std::fill_n(du, p.num_experts, 0.0f);
    for (int j = 0; j < k; ++j) du[id[j]] = -0.0f;  // what is added to it stays as it is
    for (int j = 0; j < k; ++j) {
      const int e = id[j];
      const float d = (g[j] - mean) * scale, z = clean<Portable>(to_float(logits[e]));
      flow = std::fma(d, s[e], flow);
      if (p.score_function == KIMI_SCORE_SOFTMAX)
        du[e] += d;
      else if (p.score_function == KIMI_SCORE_SIGMOID)
        du[e] += d * sigmoid_slope<Portable>(z, s[e]);
      else
        du[e] += d * sqrtsoftplus_slope<Portable>(z, s[e]);
    }
    if (p.score_function == KIMI_SCORE_SOFTMAX)
      for (int e = 0; e < p.num_experts; ++e) grad[e] = from_float<T>(s[e] * (du[e] - flow));
    else
      for (int j = 0; j < k; ++j) grad[id[j]] = from_float<T>(du[id[j]]);
  }
}

void forward(const TopkGateParams& p, int64_t begin, int64_t end, int32_t* counts) {
  dispatch(p.logits_dtype, [&]<class T>() { forward_rows<T>(p, begin, end, counts); });
}

void given(const TopkGateGivenParams& p, int64_t begin, int64_t end, int32_t* counts) {
  dispatch(p.logits_dtype, [&]<class T>() { given_rows<T>(p, begin, end, counts); });
}

void backward(const TopkGateBackwardParams& p, int64_t begin, int64_t end) {
  dispatch(p.logits_dtype, [&]<class T>() { backward_rows<T>(p, begin, end); });
}

}  // namespace

const CpuEngine kPortableEngine = {forward, given, backward, nullptr, 0.0f};

void select_groups(const TopkGateParams& p, const float* choice, bool* kept) {
  const int size = p.num_experts / p.num_groups, best_of = p.group_score_topk;
  int32_t group_key[kMaxExperts];
  float best[kMaxExperts];
  for (int group = 0; group < p.num_groups; ++group) {
    const float* c = choice + group * size;
    int held = 0;  // best[0..held) descending
    for (int e = 0; e < size; ++e) {
      if (held == best_of && !(c[e] > best[held - 1])) continue;
      int at = held < best_of ? held++ : held - 1;
      for (; at > 0 && c[e] > best[at - 1]; --at) best[at] = best[at - 1];
      best[at] = c[e];
    }
    float sum = best[0];
    for (int i = 1; i < held; ++i) sum += best[i];
    group_key[group] = sort_key(sum);
  }
  std::fill_n(kept, p.num_groups, false);
  for (int i = 0; i < p.topk_groups; ++i) {
    const int top = int(std::max_element(group_key, group_key + p.num_groups) - group_key);
    group_key[top] = kExcluded;
    kept[top] = true;
  }
}

}  // namespace kimi::gate
