// SPDX-License-Identifier: MIT
// balance: the bias rule and the auxiliary losses that keep a router's experts evenly loaded.
//
// update_expert_bias, n = tokens_per_expert [E]:
//   d_e = sign(sum_i n_i - E n_e)                        int64 arithmetic decides: no rounding
//   bias_e += rate * d_e     or, centered, rate * (d_e - (sum_i d_i) / E)
//
// sequence_counts: n_ne, how often e stands in the indices of sequence n, and S_n, its tokens. Sequences
//   lie side by side: T / N tokens each, or up to offsets; tokens that are not valid are left out
//
// sequence_balance_loss over N sequences:
//   s = score(logits) as in topk_gate;  D_t = sum_e s_te + 1e-20
//   m_t = (sum_e n_e s_te) * (1 / D_t)                 of the token's sequence
//   loss = scale * sum_t m_t (1 / S)^2,                scale = coefficient E / (K N)
//   which is coefficient * mean over sequences of sum_e f_e P_e with f = n E / (K S) and
//   P = 1/S sum_t s_t / D_t. Counts and S may be those of all ranks: the ranks' losses then add up
//   Backward (n is constant), g = d loss:
//   dz_te = (n_e - m_t) * (g * scale * (1 / S)^2 / D_t) * slope_te, slope = d s / d z; softmax: s_te,
//   since its share is s itself and the mean of n - m with weights s vanishes
//
// quantile_histogram: r = cutoff_t - s_te;  bin = floor((r - low) * (bins / (high - low))), clamped
//   into 0..bins-1;  histogram[e, bin] += 1 for every valid token: integers, in any order
//
// z_loss over the valid tokens:
//   lse_t = peak_t + log(sum_e exp(z_te - peak_t));  loss = coefficient / tokens * sum_t lse_t^2
//   Backward: dz_te = (2 g coefficient / tokens * lse_t) * exp(z_te - lse_t)
//   Logits are cleaned as in topk_gate: NaN counts as -inf, +inf as the largest finite number. A
//   row of nothing but -inf has lse -inf, so that the loss is inf; its own gradient is 0.
//
// Order of the fp32 sums, the same on every engine:
//   over experts    32 partial sums by id % 32 in ascending id; then partial l plus partial l^16,
//                   l^8, l^4, l^2, l^1
//   over tokens     runs of 64 tokens of the tensor: each in token order, then their sums in order
//
// Cost: T*E logits read once, the backward writes as many; about 20 fp32 operations a logit.
// Sources: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2), Moonlight (arXiv 2502.16982, appendix C),
// ST-MoE (arXiv 2202.08906, eq. 5).
#pragma once

#include <cstdint>

#include "common/integer.h"
#include "common/status.h"
#include "cpu/engines.h"

namespace kimi {

using UpdateExpertBiasParams = kimi_update_expert_bias_params;
using SequenceCountsParams = kimi_sequence_counts_params;
using SequenceBalanceLossParams = kimi_sequence_balance_loss_params;
using SequenceBalanceLossBackwardParams = kimi_sequence_balance_loss_backward_params;
using QuantileHistogramParams = kimi_quantile_histogram_params;
using ZLossParams = kimi_z_loss_params;
using ZLossBackwardParams = kimi_z_loss_backward_params;

Status update_expert_bias(const UpdateExpertBiasParams& p, kimi_device device, void* stream);
Status sequence_counts(const SequenceCountsParams& p, kimi_device device, void* stream);
size_t sequence_balance_loss_workspace_bytes(const SequenceBalanceLossParams& p, kimi_device);
Status sequence_balance_loss(const SequenceBalanceLossParams& p, kimi_device device, void* stream);
Status sequence_balance_loss_backward(const SequenceBalanceLossBackwardParams& p,
                                      kimi_device device, void* stream);
Status quantile_histogram(const QuantileHistogramParams& p, kimi_device device, void* stream);
size_t z_loss_workspace_bytes(const ZLossParams& p, kimi_device);
Status z_loss(const ZLossParams& p, kimi_device device, void* stream);
Status z_loss_backward(const ZLossBackwardParams& p, kimi_device device, void* stream);

// *.cu. Arguments have been checked; backwards and the histogram have T > 0.
Status update_expert_bias_cuda(const UpdateExpertBiasParams& p, void* stream);
Status sequence_counts_cuda(const SequenceCountsParams& p, void* stream);
Status sequence_balance_loss_cuda(const SequenceBalanceLossParams& p, void* stream);
Status sequence_balance_loss_backward_cuda(const SequenceBalanceLossBackwardParams& p,
                                           void* stream);
Status quantile_histogram_cuda(const QuantileHistogramParams& p, void* stream);
Status z_loss_cuda(const ZLossParams& p, void* stream);
Status z_loss_backward_cuda(const ZLossBackwardParams& p, void* stream);

namespace balance {

inline constexpr int kRun = 64;                 // tokens of a run
inline constexpr float kShareEpsilon = 1e-20f;  // of D_t

// Number of runs in `tokens` consecutive tokens.
constexpr int64_t runs(int64_t tokens) { return ceil_div(tokens, kRun); }

// Of either loss: the runs' sums. 0 for sizes that the ops refuse.
constexpr size_t workspace_bytes(int64_t tokens) {
  return tokens < 0 ? 0 : sizeof(float) * size_t(runs(tokens));
}

// `scale` of the balance loss; computed on the host only.
template <class Params>
float loss_scale(const Params& p) {
  const double slots = double(p.top_k) * double(p.num_sequences);
  return float(double(p.coefficient) * p.num_experts / slots);
}

namespace {  // every ISA file must have its own copy

// The sequence of token t, -1 for none.
template <class Params>
KIMI_HOST_DEVICE int64_t sequence_of(const Params& p, int64_t t) {
  if (p.valid && !p.valid[t]) return -1;
  if (!p.offsets) return t / (p.num_tokens / p.num_sequences);
  int64_t low = 0, high = p.num_sequences;  // the first that ends behind t
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (p.offsets[middle] > t)
      high = middle;
    else
      low = middle + 1;
  }
  return low < p.num_sequences ? low : -1;
}

// 1 / S; a sequence without tokens weighs nothing.
template <class O>
KIMI_HOST_DEVICE float reciprocal_length(int32_t tokens) {
  return tokens > 0 ? O::div(1.0f, float(tokens)) : 0.0f;
}

// Where `r` falls among `bins` bins from `low` on, `per_unit` of them to 1; NaN: the first.
template <class O>
KIMI_HOST_DEVICE int32_t bin_of(float r, float low, float per_unit, int32_t bins) {
  const float x = O::mul(O::sub(r, low), per_unit);
  if (!(x > 0.0f)) return 0;
  return x < float(bins) ? (int32_t(x) < bins ? int32_t(x) : bins - 1) : bins - 1;
}

}  // namespace

// coefficient over the number of valid tokens; any finite number where there is none: the sum is 0.
KIMI_HOST_DEVICE float z_scale(float coefficient, int32_t valid_tokens) {
  return coefficient / float(valid_tokens > 0 ? valid_tokens : 1);
}

// A sum over experts in the order above, for engines without vectors.
struct OrderedSum {
  float partial[32] = {};
  KIMI_HOST_DEVICE void add(int64_t i, float x) { partial[i % 32] += x; }
  KIMI_HOST_DEVICE float total() {
    for (int half = 16; half > 0; half /= 2)
      for (int l = 0; l < half; ++l) partial[l] += partial[l + half];
    return partial[0];
  }
};

// One CPU engine; everything runs in the calling thread.
struct CpuEngine {
  // The sum of the terms m_t / S^2 of a run's tokens [begin, end), in token order.
  float (*sum_terms)(const SequenceBalanceLossParams& p, int64_t begin, int64_t end);
  // Rows [begin, end) of the gradient.
  void (*balance_gradient)(const SequenceBalanceLossBackwardParams& p, int64_t begin, int64_t end);
  // log_sum_exp of a run's tokens [begin, end); returns the sum of their squares, in token order.
  float (*sum_squares)(const ZLossParams& p, int64_t begin, int64_t end);
  void (*z_gradient)(const ZLossBackwardParams& p, int64_t begin, int64_t end);
  // s [E rounded up to 16] = the scores of token t.
  void (*scores)(const QuantileHistogramParams& p, int64_t t, float* s);
};
KIMI_CPU_ENGINES(CpuEngine);

}  // namespace balance
}  // namespace kimi
