// SPDX-License-Identifier: MIT
// The losses for SIMD engines, a template over `O`, the operations of score_row_simd.h. Included by
// the ISA files only.
//
//   row --score--> s[E], slope[E] in the first-level cache, while 32 partial sums stay in registers
//       --second pass over the row--> added to the run's shares, or written as gradient
//
// Lanes past E load as -inf, whose score, slope and exponential are 0.
#pragma once

#include <stdint.h>
#include <string.h>

#include "balance/balance.h"
#include "topk_gate/score_row_simd.h"

namespace kimi::balance {
namespace {  // every ISA file must have its own copy: nothing here may be merged by the linker

using namespace gate;

constexpr float kInfinity = __builtin_inff();
constexpr int kRowLength = kMaxExperts + 16;  // with room for the last vector

// step(e, left, i) for every vector of a row; i = e / kLanes % (32 / kLanes) is a constant after
// unrolling, so that arrays of partial sums stay in registers.
template <class O, class Step>
inline void each_vector(int num_experts, const Step& step) {
  constexpr int kParts = 32 / O::kLanes;
  int e = 0;
  for (; e + 32 <= num_experts; e += 32)
    for (int i = 0; i < kParts; ++i) step(e + i * O::kLanes, O::kLanes, i);
  for (int i = 0; i < kParts; ++i)
    if (const int at = e + i * O::kLanes; at < num_experts) step(at, num_experts - at, i);
}

// A sum over experts in the order of balance.h.
template <class O>
struct VectorSum {
  using F = typename O::F;
  static constexpr int kParts = 32 / O::kLanes;
  F partial[kParts];
  VectorSum() {
    for (int i = 0; i < kParts; ++i) partial[i] = O::set(0.0f);
  }
  void add(int i, F x) { partial[i] = O::add(partial[i], x); }
  float total() const {
    F folded[kParts];
    for (int i = 0; i < kParts; ++i) folded[i] = partial[i];
    for (int half = kParts / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) folded[i] = O::add(folded[i], folded[i + half]);
    return O::sum_lanes(folded[0]);
  }
};

template <class O, kimi_score_function kFunction>
typename O::F slope_of(typename O::F z, typename O::F s) {
  if constexpr (kFunction == KIMI_SCORE_SIGMOID) return sigmoid_slope<O>(z, s);
  return sqrtsoftplus_slope<O>(z, s);
}

// Scores s and, where kSlope, slopes of one row; visit(e, i, s) sees every vector of scores.
template <class O, class T, kimi_score_function kFunction, bool kSlope, class Visit>
inline void each_score(const T* logits, int num_experts, float* s, float* slope,
                       const Visit& visit) {
  using F = typename O::F;
  if constexpr (kFunction == KIMI_SCORE_SOFTMAX) {
    score_row<O, T, kFunction>(logits, num_experts, s);
    each_vector<O>(num_experts, [&](int e, int, int i) { visit(e, i, O::load_all(s + e)); });
  } else {
    each_vector<O>(num_experts, [&](int e, int left, int i) {
      const F z = clean<O>(O::load_or(logits + e, left, -kInfinity));
      const F score = score_of<O, kFunction>(z);
      O::store(s + e, score);
      if constexpr (kSlope) O::store(slope + e, slope_of<O, kFunction>(z, score));
      visit(e, i, score);
    });
  }
}

template <class T, class Params>
const T* row_of(const Params& p, int64_t t) {
  return static_cast<const T*>(p.logits) + t * p.logits_stride;
}

template <class O, class T, kimi_score_function kFunction>
void sum_shares_of(const SequenceBalanceLossParams& p, int64_t begin, int64_t end, float* sums) {
  using F = typename O::F;
  alignas(64) float s[kRowLength], run[kRowLength];
  memset(run, 0, sizeof run);
  for (int64_t t = begin; t < end; ++t) {
    VectorSum<O> sum;
    each_score<O, T, kFunction, false>(row_of<T>(p, t), p.num_experts, s, nullptr,
                                       [&](int, int i, F score) { sum.add(i, score); });
    const F inverse = O::set(1.0f / (sum.total() + kShareEpsilon));
    for (int e = 0; e < p.num_experts; e += O::kLanes)
      O::store(run + e, O::add(O::load_all(run + e), O::mul(O::load_all(s + e), inverse)));
  }
  memcpy(sums, run, sizeof(float) * p.num_experts);
}

template <class O, class T, kimi_score_function kFunction>
void balance_gradient_of(const SequenceBalanceLossBackwardParams& p, int64_t begin, int64_t end) {
  using F = typename O::F;
  constexpr bool kSoftmax = kFunction == KIMI_SCORE_SOFTMAX;
  const int64_t length = p.num_tokens / p.num_sequences;
  const float weight = *p.grad_loss * loss_scale(p);
  alignas(64) float s[kRowLength], slopes[kRowLength], counts[kRowLength];
  memset(counts, 0, sizeof counts);
  int64_t sequence = -1;
  for (int64_t t = begin; t < end; ++t) {
    if (t / length != sequence) {
      sequence = t / length;
      for (int e = 0; e < p.num_experts; ++e)
        counts[e] = float(p.tokens_per_expert[sequence * p.num_experts + e]);
    }
    VectorSum<O> sum, weighted;
    each_score<O, T, kFunction, !kSoftmax>(
        row_of<T>(p, t), p.num_experts, s, slopes, [&](int e, int i, F score) {
          sum.add(i, score);
          weighted.add(i, O::mul(O::load_all(counts + e), score));
        });
    const float inverse = 1.0f / (sum.total() + kShareEpsilon);
    const F mean = O::set(weighted.total() * inverse), factor = O::set(weight * inverse);
    const float* slope = kSoftmax ? s : slopes;
    T* grad = static_cast<T*>(p.grad_logits) + t * p.num_experts;
    for (int e = 0; e < p.num_experts; e += O::kLanes) {
      const F above = O::sub(O::load_all(counts + e), mean);
      O::store_as(grad + e, p.num_experts - e,
                  O::mul(O::mul(above, factor), O::load_all(slope + e)));
    }
  }
}

struct PeakAndSum {
  float peak, sum;
};

template <class O, class T>
PeakAndSum sum_exponentials(const T* logits, int num_experts) {
  using F = typename O::F;
  alignas(64) float z[kRowLength];
  F tops[32 / O::kLanes];
  for (F& top : tops) top = O::set(-kMaxFloat);
  each_vector<O>(num_experts, [&](int e, int left, int i) {
    const F cleaned = clean<O>(O::load_or(logits + e, left, -kInfinity));
    O::store(z + e, cleaned);
    tops[i] = O::max(tops[i], cleaned);
  });
  for (int i = 1; i < 32 / O::kLanes; ++i) tops[0] = O::max(tops[0], tops[i]);
  const float peak = O::reduce_max(tops[0]);
  VectorSum<O> sum;
  each_vector<O>(num_experts, [&](int e, int, int i) {
    sum.add(i, softmax_numerator<O>(O::load_all(z + e), O::set(peak)));
  });
  return {peak, sum.total()};
}

template <class O, class T>
float sum_squares_of(const ZLossParams& p, int64_t begin, int64_t end) {
  using F = typename O::F;
  const int count = int(end - begin);
  alignas(64) float peak[kRun], sum[kRun];
  for (int i = 0; i < kRun; ++i) {
    PeakAndSum row{0.0f, 1.0f};  // whose logarithm is 0
    if (i < count && (!p.valid || p.valid[begin + i]))
      row = sum_exponentials<O>(row_of<T>(p, begin + i), p.num_experts);
    peak[i] = row.peak;
    sum[i] = row.sum;
  }
  for (int i = 0; i < kRun; i += O::kLanes) {
    const F x = O::load_all(sum + i);
    const F lse = O::add(O::load_all(peak + i), log_at_least_one<O>(x));
    O::store(peak + i, O::select(O::less(O::set(0.0f), x), lse, O::set(-kInfinity)));
  }
  float total = 0.0f;
  for (int i = 0; i < count; ++i) {
    p.log_sum_exp[begin + i] = peak[i];
    total += peak[i] * peak[i];
  }
  return total;
}

template <class O, class T>
void z_gradient_of(const ZLossBackwardParams& p, int64_t begin, int64_t end) {
  using F = typename O::F;
  const float weight = 2.0f * (*p.grad_loss * z_scale(p.coefficient, *p.valid_tokens));
  for (int64_t t = begin; t < end; ++t) {
    const T* logits = row_of<T>(p, t);
    T* grad = static_cast<T*>(p.grad_logits) + t * p.num_experts;
    const float lse = p.log_sum_exp[t];
    if (lse == 0.0f || lse == -kInfinity) {  // left out, or nothing but -inf
      memset(grad, 0, sizeof(T) * p.num_experts);
      continue;
    }
    const F factor = O::set(weight * lse), peak = O::set(lse);
    for (int e = 0; e < p.num_experts; e += O::kLanes) {
      const F z = clean<O>(O::load(logits + e, p.num_experts - e));
      O::store_as(grad + e, p.num_experts - e, O::mul(factor, softmax_numerator<O>(z, peak)));
    }
  }
}

template <class O>
void sum_shares(const SequenceBalanceLossParams& p, int64_t begin, int64_t end, float* sums) {
  dispatch_score(p.logits_dtype, p.score_function, [&]<class T, kimi_score_function kFunction>() {
    sum_shares_of<O, T, kFunction>(p, begin, end, sums);
  });
}
template <class O>
void balance_gradient(const SequenceBalanceLossBackwardParams& p, int64_t begin, int64_t end) {
  dispatch_score(p.logits_dtype, p.score_function, [&]<class T, kimi_score_function kFunction>() {
    balance_gradient_of<O, T, kFunction>(p, begin, end);
  });
}
template <class O>
float sum_squares(const ZLossParams& p, int64_t begin, int64_t end) {
  return dispatch(p.logits_dtype, [&]<class T>() { return sum_squares_of<O, T>(p, begin, end); });
}
template <class O>
void z_gradient(const ZLossBackwardParams& p, int64_t begin, int64_t end) {
  dispatch(p.logits_dtype, [&]<class T>() { z_gradient_of<O, T>(p, begin, end); });
}

}  // namespace
}  // namespace kimi::balance
