// SPDX-License-Identifier: MIT
// The balance loss for SIMD engines, a template over `O`, the vectors of cpu/vec_*.h, and
// what the z-loss shares with it. Included by the ISA files only.
//
//   row --score--> s[E], slope[E] in the first-level cache, while 32 partial sums stay in registers
//       --> the row's term of the loss, or a second pass over the row that writes its gradient
//
// Each stage runs over a block of tokens, so that the processor overlaps the latencies at the ends
// of rows. Lanes past E load as -inf, whose score, slope and exponential are 0.
#pragma once

#include <stdint.h>
#include <string.h>

#include "balance/balance.h"
#include "cpu/vec_portable.h"
#include "topk_gate/score_row_simd.h"

namespace kimi::balance {
namespace {  // every ISA file must have its own copy: nothing here may be merged by the linker

using namespace gate;

constexpr float kInfinity = __builtin_inff();
constexpr int kRowLength = kMaxExperts + 16;  // with room for the last vector
constexpr int kBlock = 4;                     // tokens that share a pass through the stages

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

// Fetches what lies some elements further while this row is computed: the hardware's own prefetch
// ends at every page. The address need not exist.
template <class T>
inline void prefetch_ahead(const T* at, int64_t elements) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(at) +
                                                   uintptr_t(elements) * sizeof(T)));
}

template <class O, kimi_score_function kFunction>
typename O::F slope_of(typename O::F z, typename O::F s) {
  if constexpr (kFunction == KIMI_SCORE_SIGMOID) return sigmoid_slope<O>(z, s);
  return sqrtsoftplus_slope<O>(z, s);
}

// Scores s and, where kSlope, slopes of one row; visit(e, i, s) sees every vector of scores.
template <class O, class T, kimi_score_function kFunction, bool kSlope, class Visit>
inline void each_score(const T* logits, int64_t stride, int num_experts, float* s, float* slope,
                       const Visit& visit) {
  using F = typename O::F;
  if constexpr (kFunction == KIMI_SCORE_SOFTMAX) {
    score_row<O, T, kFunction>(logits, num_experts, s);
    each_vector<O>(num_experts, [&](int e, int, int i) { visit(e, i, O::load(s + e)); });
  } else {
    each_vector<O>(num_experts, [&](int e, int left, int i) {
      prefetch_ahead(logits + e, 2 * stride);
      const F raw = O::load_or(logits + e, left, -kInfinity);
      const F z = kFunction == KIMI_SCORE_SIGMOID ? raw : clean<O>(raw);
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

// Neighbours of one sequence, kBlock at most: visit(sequence, first, rows); sequence -1: of none.
template <class Params, class Visit>
void each_block(const Params& p, int64_t begin, int64_t end, const Visit& visit) {
  for (int64_t first = begin; first < end;) {
    const int64_t sequence = sequence_of(p, first);
    int rows = 1;
    while (rows < kBlock && first + rows < end && sequence_of(p, first + rows) == sequence) ++rows;
    visit(sequence, first, rows);
    first += rows;
  }
}

// What a sequence's rows are weighed with.
template <class O>
struct Loads {
  alignas(64) float counts[kRowLength] = {};
  float share = 0.0f;  // 1 / S^2
  int64_t held = -1;

  template <class Params>
  void take(const Params& p, int64_t sequence) {
    if (sequence == held) return;
    held = sequence;
    for (int e = 0; e < p.num_experts; ++e)
      counts[e] = float(p.tokens_per_expert[sequence * p.num_experts + e]);
    share = reciprocal_length<cpu::Portable>(p.sequence_tokens[sequence]);
    share *= share;
  }
};

// Scores s [E] of one row, where kSlope its slopes, 1 / D and m.
template <class O, class T, kimi_score_function kFunction, bool kSlope, class Params>
void mean_of(const Params& p, int64_t t, const float* counts, float* s, float* slope,
             float& inverse, float& mean) {
  VectorSum<O> sum, weighted;
  each_score<O, T, kFunction, kSlope>(row_of<T>(p, t), p.logits_stride, p.num_experts, s, slope,
                                      [&](int e, int i, typename O::F score) {
                                        sum.add(i, score);
                                        weighted.add(i, O::mul(O::load(counts + e), score));
                                      });
  inverse = 1.0f / (sum.total() + kShareEpsilon);
  mean = weighted.total() * inverse;
}

template <class O, class T, kimi_score_function kFunction>
float sum_terms_of(const SequenceBalanceLossParams& p, int64_t begin, int64_t end) {
  alignas(64) float s[kBlock][kRowLength];
  float inverse[kBlock], mean[kBlock], total = 0.0f;
  Loads<O> loads;
  each_block(p, begin, end, [&](int64_t sequence, int64_t first, int rows) {
    if (sequence < 0) return;
    loads.take(p, sequence);
    for (int r = 0; r < rows; ++r)
      mean_of<O, T, kFunction, false>(p, first + r, loads.counts, s[r], nullptr, inverse[r],
                                      mean[r]);
    for (int r = 0; r < rows; ++r) total += mean[r] * loads.share;
  });
  return total;
}

template <class O, class T, kimi_score_function kFunction>
void balance_gradient_of(const SequenceBalanceLossBackwardParams& p, int64_t begin, int64_t end) {
  using F = typename O::F;
  constexpr bool kSoftmax = kFunction == KIMI_SCORE_SOFTMAX;
  const float weight = *p.grad_loss * loss_scale(p);
  alignas(64) float s[kBlock][kRowLength], slopes[kBlock][kRowLength];
  float inverse[kBlock], mean[kBlock];
  Loads<O> loads;
  each_block(p, begin, end, [&](int64_t sequence, int64_t first, int rows) {
    T* grad = static_cast<T*>(p.grad_logits) + first * p.num_experts;
    if (sequence < 0) {
      memset(grad, 0, sizeof(T) * rows * p.num_experts);
      return;
    }
    loads.take(p, sequence);
    for (int r = 0; r < rows; ++r)
      mean_of<O, T, kFunction, !kSoftmax>(p, first + r, loads.counts, s[r], slopes[r], inverse[r],
                                          mean[r]);
    for (int r = 0; r < rows; ++r, grad += p.num_experts) {
      const float* slope = kSoftmax ? s[r] : slopes[r];
      const F factor = O::set(weight * loads.share * inverse[r]);
      each_vector<O>(p.num_experts, [&](int e, int left, int) {
        const F above = O::sub(O::load(loads.counts + e), O::set(mean[r]));
        O::store(grad + e, O::mul(O::mul(above, factor), O::load(slope + e)), left);
      });
    }
  });
}

template <class O>
float sum_terms(const SequenceBalanceLossParams& p, int64_t begin, int64_t end) {
  float sum = 0.0f;
  dispatch_score(p.logits_dtype, p.score_function, [&]<class T, kimi_score_function kFunction>() {
    sum = sum_terms_of<O, T, kFunction>(p, begin, end);
  });
  return sum;
}
template <class O>
void balance_gradient(const SequenceBalanceLossBackwardParams& p, int64_t begin, int64_t end) {
  dispatch_score(p.logits_dtype, p.score_function, [&]<class T, kimi_score_function kFunction>() {
    balance_gradient_of<O, T, kFunction>(p, begin, end);
  });
}
template <class O>
void scores(const QuantileHistogramParams& p, int64_t t, float* s) {
  dispatch_score(p.logits_dtype, p.score_function, [&]<class T, kimi_score_function kFunction>() {
    score_row<O, T, kFunction>(row_of<T>(p, t), p.num_experts, s);
  });
}

}  // namespace
}  // namespace kimi::balance
