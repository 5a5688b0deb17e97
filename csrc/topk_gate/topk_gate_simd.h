// SPDX-License-Identifier: MIT
// The gate for SIMD engines, a template over `O`: the vectors of cpu/vec_*.h plus counts
// and the candidate scan. Included by the ISA files only.
//
//   row --score--> s[E] --bias--> c[E]            one pass, kLanes experts a step; NaN: excluded
//                                  |             (sigmoid: estimates of c, filter.h)
//   maxima of kBound lanes (expert e belongs to lane e % kBound)
//                                  v
//   bound = K-th largest lane maximum: at least K experts reach it, about 1.4 K do
//   candidates = ids with c >= bound   --rank by (c, lower id)-->   indices[K]
//
// The rank of a candidate is the number of better ones, so no sort and no branch is needed. Rows of
// more than kMaxCandidates have ties, or all their large scores in few lanes: then the bound is
// raised to the K-th largest choice itself, by bisection, and of those that tie with it only the
// first ids stay. The bound decides which ids are looked at, never the result: behind estimates it
// is lowered by what they may err, and the candidates alone are scored. A row where that leaves too
// many is scored whole, and so are the kWhole blocks after it. Each stage runs over a block of
// tokens, so that the processor overlaps their latencies.
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>

#include "cpu/vec_portable.h"
#include "cpu/vectors.h"
#include "topk_gate/filter.h"
#include "topk_gate/score_row_simd.h"
#include "topk_gate/select_simd.h"
#include "topk_gate/topk_gate.h"

namespace kimi::gate {
namespace {  // every ISA file must have its own copy: nothing here may be merged by the linker

constexpr int kMaxTopK = KIMI_TOPK_GATE_MAX_K;
constexpr int kBlock = 8;                     // tokens that share a pass through the stages
constexpr int kRowLength = kMaxExperts + 16;  // one row's scratch, with room for the last vector

struct Scratch {
  alignas(64) float s[kBlock][kRowLength], choice[kBlock][kRowLength], lanes[kBlock][64];
  alignas(64) int32_t candidates[kBlock][kMaxCandidates + 16];
  alignas(64) float score[kBlock][kMaxCandidates];
  alignas(64) float value[kBlock][kMaxCandidates + 16];  // choice scores of candidates
  int count[kBlock];
  float bound[kBlock];
};

constexpr int kAhead = 8;             // rows
constexpr int kWhole = 16;            // blocks without estimates
constexpr int kLeastEstimated = 192;  // experts: fewer cost no more than their candidates

// Choice scores c of one row, or their estimates (NaN past the end), and its lane maxima. The row
// `ahead` elements on is fetched meanwhile: the hardware's prefetch stops at every page, which holds
// 2.7 rows of K2.
template <class O, class T, kimi_score_function kFunction, int kBound, bool kEstimate>
void choose_row(const T* logits, int64_t ahead, const TopkGateParams& p, float* s, float* choice,
                float* lanes) {
  using F = typename O::F;
  constexpr int kVectors = kBound / O::kLanes;
  const int num_experts = p.num_experts;
  const float* bias = p.expert_bias;
  const bool by_logits = p.select_logits != 0;
  F top[kVectors];
  for (int v = 0; v < kVectors; ++v) top[v] = O::set(-__builtin_inff());
  if constexpr (kFunction == KIMI_SCORE_SOFTMAX) score_row<O, T, kFunction>(logits, num_experts, s);
  const auto step = [&](int e, int left, F& lane_top) {
    const F z = O::load(logits + e, left);
    if constexpr (kEstimate) {
      const F s = sigmoid_estimate<typename O::Estimates>(z);
      const F a = O::keep_first(bias ? O::add(s, O::load(bias + e, left)) : s, left);
      O::store(choice + e, a);
      lane_top = O::max(a, lane_top);  // the second operand where the first is NaN
      return;
    }
    const auto nan = O::is_nan(z);
    F score;
    if constexpr (kFunction == KIMI_SCORE_SOFTMAX) {
      score = O::load(s + e);
    } else {  // a NaN scores 0
      score = score_of<O, kFunction>(kFunction == KIMI_SCORE_SIGMOID ? z : clean<O>(z));
      O::store(s + e, score);
    }
    if (by_logits) score = clean<O>(z);
    const F c = bias ? O::add(score, O::load(bias + e, left)) : score;
    const F cleaned = O::keep_first(O::lowest_if(nan, c), left);
    O::store(choice + e, cleaned);
    lane_top = O::max(cleaned, lane_top);  // the second operand where the first is NaN
  };
  int e = 0;
  for (; e + kBound <= num_experts; e += kBound) {
    for (int v = 0; v < kVectors; ++v) step(e + v * O::kLanes, O::kLanes, top[v]);
    const uintptr_t next = reinterpret_cast<uintptr_t>(logits + e) + uintptr_t(ahead) * sizeof(T);
    for (size_t line = 0; line < kBound * sizeof(T); line += 64)
      __builtin_prefetch(reinterpret_cast<const void*>(next + line));
  }
  for (int v = 0; e < num_experts; e += O::kLanes, ++v) step(e, num_experts - e, top[v]);
  for (int v = 0; v < kVectors; ++v) O::store(lanes + v * O::kLanes, top[v]);
}

// Scores and choices of the candidates of one row, where estimates were; whole vectors.
template <class O, class T>
void score_candidates(const T* logits, const float* bias, const int32_t* candidates, int count,
                      float* score, float* value) {
  static_assert(kMaxCandidates % O::kLanes == 0);
  for (int i = 0; i < count; ++i) score[i] = to_float(logits[candidates[i]]);
  for (int i = count; i % O::kLanes; ++i) score[i] = 0.0f;
  for (int i = 0; i < count; i += O::kLanes)
    O::store(score + i, score_of<O, KIMI_SCORE_SIGMOID>(O::load(score + i)));
  for (int i = 0; i < count; ++i) value[i] = bias ? score[i] + bias[candidates[i]] : score[i];
}

template <class O, class T, kimi_score_function kFunction, int kBound>
void forward_rows(const TopkGateParams& p, int64_t begin, int64_t end, int32_t* counts) {
  constexpr bool kEstimate = kFunction == KIMI_SCORE_SIGMOID;
  const int experts = p.num_experts, k = p.top_k;
  int whole = 0;  // blocks to come without estimates
  Scratch a;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int rows = int(end - first < kBlock ? end - first : kBlock);
    const auto each = [&](const auto& stage) {
      for (int i = 0; i < rows; ++i)
        if (!p.valid || p.valid[first + i]) stage(i, p.indices + (first + i) * k);
    };
    const bool estimate = kEstimate && experts >= kLeastEstimated && p.num_groups == 1 &&
                          !p.select_logits && whole == 0;
    whole -= whole > 0;
    const auto logits = [&](int i) {
      return static_cast<const T*>(p.logits) + (first + i) * p.logits_stride;
    };
    const auto choose = [&]<bool kEstimates>(std::bool_constant<kEstimates>, int i) {
      choose_row<O, T, kFunction, kBound, kEstimates>(logits(i), kAhead * p.logits_stride, p,
                                                      a.s[i], a.choice[i], a.lanes[i]);
    };
    each([&](int i, int32_t*) {
      if (estimate) return choose(std::bool_constant<kEstimate>{}, i);
      choose(std::false_type{}, i);
      if (p.num_groups > 1) apply_groups<O, kBound>(p, a.choice[i], a.lanes[i]);
    });
    each([&](int i, int32_t*) {
      a.bound[i] = kth_largest<O, kBound>(a.lanes[i], k);
      if (estimate) a.bound[i] = candidates_from<cpu::Portable>(a.bound[i], O::Estimates::kError);
    });
    const auto collect = [&](int i) {
      a.count[i] = O::collect(a.choice[i], experts, a.bound[i], kMaxCandidates, a.candidates[i]);
    };
    each([&](int i, int32_t*) {
      const int32_t* candidates = a.candidates[i];
      collect(i);
      if (estimate) {
        if (a.bound[i] > -__builtin_inff() && a.count[i] >= k && a.count[i] <= kMaxCandidates)
          return score_candidates<O>(logits(i), p.expert_bias, candidates, a.count[i], a.score[i],
                                     a.value[i]);
        whole = kWhole;
        choose(std::false_type{}, i);
        a.bound[i] = kth_largest<O, kBound>(a.lanes[i], k);
        collect(i);
      }
      if (a.count[i] > kMaxCandidates)
        a.count[i] = collect_fewer<O>(a.choice[i], experts, a.bound[i], k, a.candidates[i]);
      for (int j = 0; j < a.count[i]; ++j) {
        a.score[i][j] = a.s[i][candidates[j]];
        a.value[i][j] = a.choice[i][candidates[j]];
      }
    });
    each([&](int i, int32_t* indices) {
      int32_t position[kMaxCandidates + 16], id[kMaxCandidates];
      float score[kMaxCandidates], *weights = p.weights + (first + i) * k;
      rank<O>(a.value[i], a.count[i], position);
      for (int j = 0; j < a.count[i]; ++j) {
        id[position[j]] = a.candidates[i][j];
        score[position[j]] = a.score[i][j];
      }
      for (int j = 0; j < k; ++j) {
        indices[j] = id[j];
        weights[j] = score[j];
        ++counts[id[j]];
      }
      weigh<O>(p, weights);
    });
    for (int i = 0; p.valid && i < rows; ++i)
      for (int j = 0; !p.valid[first + i] && j < k; ++j) {
        p.weights[(first + i) * k + j] = 0.0f;
        p.indices[(first + i) * k + j] = -1;
      }
  }
}

// Scores u of k experts of a row, and z, their logits, where the score function needs no others; s [E]
// is filled for softmax alone. Room for whole vectors.
template <class O, class T, kimi_score_function kFunction>
void score_chosen(const T* logits, int num_experts, const int32_t* id, int k, float* s, float* z,
                  float* u) {
  if constexpr (kFunction == KIMI_SCORE_SOFTMAX) {
    score_row<O, T, kFunction>(logits, num_experts, s);
    for (int j = 0; j < k; ++j) u[j] = s[id[j]];
  } else {
    for (int j = 0; j < k; ++j) z[j] = to_float(logits[id[j]]);
    for (int j = 0; j < k; j += O::kLanes)
      O::store(u + j, score_of<O, kFunction>(clean<O>(O::load(z + j))));
  }
}

template <class O, class T, kimi_score_function kFunction>
void given_rows(const TopkGateGivenParams& p, int64_t begin, int64_t end, int32_t* counts) {
  alignas(64) float s[kMaxExperts + O::kLanes];
  alignas(64) float z[kMaxTopK + O::kLanes], u[kMaxTopK + O::kLanes];
  memset(z, 0, sizeof z);
  for (int64_t t = begin; t < end; ++t) {
    const int32_t* given = p.given + t * p.top_k;
    int32_t* indices = p.indices + t * p.top_k;
    int32_t id[kMaxTopK];
    int k = 0;
    for (int j = 0; j < p.top_k; ++j) {
      const bool slot = uint32_t(given[j]) < uint32_t(p.num_experts) && (!p.valid || p.valid[t]);
      indices[j] = slot ? given[j] : -1;
      if (slot) ++counts[id[k++] = given[j]];
    }
    if (k > 0)
      score_chosen<O, T, kFunction>(static_cast<const T*>(p.logits) + t * p.logits_stride,
                                    p.num_experts, id, k, s, z, u);
    float* weights = p.weights + t * p.top_k;
    for (int j = 0, from = 0; j < p.top_k; ++j) weights[j] = indices[j] < 0 ? 0.0f : u[from++];
    weigh<O>(p, weights);
  }
}

template <class O, class T, kimi_score_function kFunction>
void backward_rows(const TopkGateBackwardParams& p, int64_t begin, int64_t end) {
  using F = typename O::F;
  const int experts = p.num_experts;
  alignas(64) float s[kMaxExperts + O::kLanes], du[kMaxExperts + O::kLanes];
  alignas(64) float z[kMaxTopK + O::kLanes], u[kMaxTopK + O::kLanes], d[kMaxTopK + O::kLanes];
  float g[kMaxTopK];
  int32_t id[kMaxTopK];
  memset(du, 0, sizeof du);
  memset(z, 0, sizeof z);
  memset(d, 0, sizeof d);
  for (int64_t t = begin; t < end; ++t) {
    const T* logits = static_cast<const T*>(p.logits) + t * p.logits_stride;
    T* grad = static_cast<T*>(p.grad_logits) + t * experts;
    int k = 0;  // slots that are not dropped; a dropped one would add zeros to every sum
    for (int64_t slot = t * p.top_k; slot < (t + 1) * p.top_k; ++slot) {
      id[k] = p.indices[slot];
      g[k] = p.grad_weights[slot];
      k += uint32_t(id[k]) < uint32_t(experts);
    }
    if (k == 0 || kFunction != KIMI_SCORE_SOFTMAX) memset(grad, 0, sizeof(T) * experts);
    if (k == 0) continue;
    score_chosen<O, T, kFunction>(logits, experts, id, k, s, z, u);
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
    if constexpr (kFunction != KIMI_SCORE_SOFTMAX) {
      for (int j = 0; j < k; j += O::kLanes) {
        const F uj = O::load(u + j);
        const F zj = clean<O>(O::load(z + j));
        const F slope = kFunction == KIMI_SCORE_SIGMOID ? sigmoid_slope<O>(zj, uj)
                                                        : sqrtsoftplus_slope<O>(zj, uj);
        O::store(d + j, O::mul(O::load(d + j), slope));
      }
    }
    for (int j = 0; j < k; ++j) du[id[j]] = -0.0f;  // what is added to it stays as it is
    for (int j = 0; j < k; ++j) du[id[j]] += d[j];
    if constexpr (kFunction == KIMI_SCORE_SOFTMAX) {
      for (int e = 0; e < experts; e += O::kLanes)
        O::store(grad + e, O::mul(O::load(s + e), O::sub(O::load(du + e), O::set(flow))),
                 experts - e);
    } else {
      for (int j = 0; j < k; ++j) grad[id[j]] = from_float<T>(du[id[j]]);
    }
    for (int j = 0; j < k; ++j) du[id[j]] = 0.0f;
  }
}

template <class O>
void forward(const TopkGateParams& p, int64_t begin, int64_t end, int32_t* counts) {
  dispatch_score(p.logits_dtype, p.score_function, [&]<class T, kimi_score_function kFunction>() {
    // Twice as many lanes as K keep the candidates few: 11 of 384 at K = 8, 22 at K = 16.
    if (p.top_k <= 8) return forward_rows<O, T, kFunction, 16>(p, begin, end, counts);
    if (p.top_k <= 16) return forward_rows<O, T, kFunction, 32>(p, begin, end, counts);
    return forward_rows<O, T, kFunction, 64>(p, begin, end, counts);
  });
}

template <class O>
void given(const TopkGateGivenParams& p, int64_t begin, int64_t end, int32_t* counts) {
  dispatch_score(p.logits_dtype, p.score_function, [&]<class T, kimi_score_function kFunction>() {
    given_rows<O, T, kFunction>(p, begin, end, counts);
  });
}

template <class O>
void backward(const TopkGateBackwardParams& p, int64_t begin, int64_t end) {
  dispatch_score(p.logits_dtype, p.score_function, [&]<class T, kimi_score_function kFunction>() {
    backward_rows<O, T, kFunction>(p, begin, end);
  });
}

template <class O>
void estimate(const float* logits, int64_t n, float* estimates) {
  cpu::vectors<O>(n, [&](int64_t i, int left) {
    O::store(estimates + i, sigmoid_estimate<typename O::Estimates>(O::load(logits + i, left)),
             left);
  });
}

template <class O>
constexpr CpuEngine kEngine = {forward<O>, given<O>, backward<O>, estimate<O>,
                               O::Estimates::kError};

}  // namespace
}  // namespace kimi::gate
