// SPDX-License-Identifier: MIT
// The portable engine of the losses: one row after another, plain loops, balance.h in code.
#include <algorithm>
#include <cstdint>

#include "balance/balance.h"
#include "topk_gate/score_row_portable.h"

namespace kimi::balance {
namespace {

using namespace gate;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

template <class T, class Params>
const T* row_of(const Params& p, int64_t t) {
  return static_cast<const T*>(p.logits) + t * p.logits_stride;
}

// 1 / D and m of a row, whose scores are s [E].
struct Mean {
  float inverse, mean;
};
Mean mean_of(int num_experts, const int32_t* counts, const float* s) {
  OrderedSum sum, weighted;
  for (int e = 0; e < num_experts; ++e) {
    sum.add(e, s[e]);
    weighted.add(e, float(counts[e]) * s[e]);
  }
  const float inverse = 1.0f / (sum.total() + kShareEpsilon);
  return {inverse, weighted.total() * inverse};
}

template <class T>
float sum_terms_of(const SequenceBalanceLossParams& p, int64_t begin, int64_t end) {
  float s[kMaxExperts], total = 0.0f;
  for (int64_t t = begin; t < end; ++t) {
    const int64_t sequence = sequence_of(p, t);
    if (sequence < 0) continue;
    score_row(row_of<T>(p, t), p.num_experts, p.score_function, s);
    const Mean row = mean_of(p.num_experts, p.tokens_per_expert + sequence * p.num_experts, s);
    const float share = reciprocal_length<Portable>(p.sequence_tokens[sequence]);
    total += row.mean * (share * share);
  }
  return total;
}

float slope_of(kimi_score_function function, float z, float s) {
  if (function == KIMI_SCORE_SOFTMAX) return s;
  return function == KIMI_SCORE_SIGMOID ? sigmoid_slope<Portable>(z, s)
                                        : sqrtsoftplus_slope<Portable>(z, s);
}

template <class T>
void balance_gradient_of(const SequenceBalanceLossBackwardParams& p, int64_t begin, int64_t end) {
  const float weight = *p.grad_loss * loss_scale(p);
  float s[kMaxExperts];
  for (int64_t t = begin; t < end; ++t) {
    const T* logits = row_of<T>(p, t);
    T* grad = static_cast<T*>(p.grad_logits) + t * p.num_experts;
    const int64_t sequence = sequence_of(p, t);
    if (sequence < 0) {
      std::fill_n(grad, p.num_experts, T{});
      continue;
    }
    const int32_t* counts = p.tokens_per_expert + sequence * p.num_experts;
    score_row(logits, p.num_experts, p.score_function, s);
    const Mean row = mean_of(p.num_experts, counts, s);
    const float share = reciprocal_length<Portable>(p.sequence_tokens[sequence]);
    const float factor = weight * (share * share) * row.inverse;
    for (int e = 0; e < p.num_experts; ++e) {
      const float z = clean<Portable>(to_float(logits[e]));
      const float slope = slope_of(p.score_function, z, s[e]);
      grad[e] = from_float<T>((float(counts[e]) - row.mean) * factor * slope);
    }
  }
}

template <class T>
float log_sum_exp(const T* logits, int num_experts) {
  float peak = -std::numeric_limits<float>::max();
  for (int e = 0; e < num_experts; ++e) peak = std::max(peak, clean<Portable>(to_float(logits[e])));
  OrderedSum sum;
  for (int e = 0; e < num_experts; ++e)
    sum.add(e, softmax_numerator<Portable>(clean<Portable>(to_float(logits[e])), peak));
  const float total = sum.total();
  return total > 0.0f ? peak + math::log_at_least_one<Portable>(total) : -kInfinity;
}

template <class T>
float sum_squares_of(const ZLossParams& p, int64_t begin, int64_t end) {
  float sum = 0.0f;
  for (int64_t t = begin; t < end; ++t) {
    const float lse = !p.valid || p.valid[t] ? log_sum_exp(row_of<T>(p, t), p.num_experts) : 0.0f;
    p.log_sum_exp[t] = lse;
    sum += lse * lse;
  }
  return sum;
}

template <class T>
void z_gradient_of(const ZLossBackwardParams& p, int64_t begin, int64_t end) {
  const float weight = 2.0f * (*p.grad_loss * z_scale(p.coefficient, *p.valid_tokens));
  for (int64_t t = begin; t < end; ++t) {
    const T* logits = row_of<T>(p, t);
    T* grad = static_cast<T*>(p.grad_logits) + t * p.num_experts;
    const float lse = p.log_sum_exp[t], factor = weight * lse;
    for (int e = 0; e < p.num_experts; ++e) {
      if (lse == 0.0f || lse == -kInfinity) {  // left out, or nothing but -inf
        grad[e] = T{};
        continue;
      }
      const float z = clean<Portable>(to_float(logits[e]));
      grad[e] = from_float<T>(factor * softmax_numerator<Portable>(z, lse));
    }
  }
}

float sum_terms(const SequenceBalanceLossParams& p, int64_t begin, int64_t end) {
  return dispatch(p.logits_dtype, [&]<class T>() { return sum_terms_of<T>(p, begin, end); });
}
void balance_gradient(const SequenceBalanceLossBackwardParams& p, int64_t begin, int64_t end) {
  dispatch(p.logits_dtype, [&]<class T>() { balance_gradient_of<T>(p, begin, end); });
}
float sum_squares(const ZLossParams& p, int64_t begin, int64_t end) {
  return dispatch(p.logits_dtype, [&]<class T>() { return sum_squares_of<T>(p, begin, end); });
}
void z_gradient(const ZLossBackwardParams& p, int64_t begin, int64_t end) {
  dispatch(p.logits_dtype, [&]<class T>() { z_gradient_of<T>(p, begin, end); });
}

void scores(const QuantileHistogramParams& p, int64_t t, float* s) {
  dispatch(p.logits_dtype,
           [&]<class T>() { score_row(row_of<T>(p, t), p.num_experts, p.score_function, s); });
}

}  // namespace

const CpuEngine kPortableEngine = {sum_terms, balance_gradient, sum_squares, z_gradient, scores};

}  // namespace kimi::balance
