// SPDX-License-Identifier: MIT
// balance: the bias rule and the auxiliary losses that keep a router's experts evenly loaded.
//
// update_expert_bias, n = tokens_per_expert [E]:
//   d_e = sign(sum_i n_i - E n_e)                        int64 arithmetic decides: no rounding
//   bias_e += rate * d_e     or, centered, rate * (d_e - (sum_i d_i) / E)
//
// sequence_balance_loss over N sequences of S = T / N tokens:
//   s = score(logits) as in topk_gate;  D_t = sum_e s_te + 1e-20;  share_te = s_te * (1 / D_t)
//   n_e = how often e stands in the sequence's indices;  Q_e = sum_t share_te
//   loss = scale * sum over sequences of sum_e n_e Q_e,   scale = coefficient E / (K S S N)
//   which is coefficient * mean over sequences of sum_e f_e P_e with f = n E / (K S), P = Q / S
//   Backward (n is constant), g = d loss:  m_t = (sum_e n_e s_te) / D_t
//   dz_te = (n_e - m_t) * (g * scale / D_t) * slope_te, slope = d s / d z; softmax: s_te, since its
//   share is s itself and the mean of n - m with weights s vanishes
//
// z_loss over the valid tokens:
//   lse_t = peak_t + log(sum_e exp(z_te - peak_t));  loss = coefficient / tokens * sum_t lse_t^2
//   Backward: dz_te = (2 g coefficient / tokens * lse_t) * exp(z_te - lse_t)
//   Logits are cleaned as in topk_gate: NaN counts as -inf, +inf as the largest finite number. A
//   row of nothing but -inf has lse -inf, so that the loss is inf; its own gradient is 0.
//
// Order of the fp32 sums, the same on every engine:
//   over experts    32 partial sums by id % 32 in ascending id; then partial l plus partial l^16,
//                   l^8, l^4, l^2, l^1 (so do the sums over sequences, by their number)
//   over tokens     runs of 64 tokens, counted from the sequence's (z_loss: the tensor's) start:
//                   each run in token order, then the runs' sums in order
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
using SequenceBalanceLossParams = kimi_sequence_balance_loss_params;
using SequenceBalanceLossBackwardParams = kimi_sequence_balance_loss_backward_params;
using ZLossParams = kimi_z_loss_params;
using ZLossBackwardParams = kimi_z_loss_backward_params;

Status update_expert_bias(const UpdateExpertBiasParams& p, kimi_device device, void* stream);
size_t sequence_balance_loss_workspace_bytes(const SequenceBalanceLossParams& p, kimi_device);
Status sequence_balance_loss(const SequenceBalanceLossParams& p, kimi_device device, void* stream);
Status sequence_balance_loss_backward(const SequenceBalanceLossBackwardParams& p,
                                      kimi_device device, void* stream);
size_t z_loss_workspace_bytes(const ZLossParams& p, kimi_device);
Status z_loss(const ZLossParams& p, kimi_device device, void* stream);
Status z_loss_backward(const ZLossBackwardParams& p, kimi_device device, void* stream);

// balance.cu, balance_backward.cu. Arguments have been checked; backwards have T > 0.
Status update_expert_bias_cuda(const UpdateExpertBiasParams& p, void* stream);
Status sequence_balance_loss_cuda(const SequenceBalanceLossParams& p, void* stream);
Status sequence_balance_loss_backward_cuda(const SequenceBalanceLossBackwardParams& p,
                                           void* stream);
Status z_loss_cuda(const ZLossParams& p, void* stream);
Status z_loss_backward_cuda(const ZLossBackwardParams& p, void* stream);

namespace balance {

inline constexpr int kRun = 64;                 // tokens of a run
inline constexpr float kShareEpsilon = 1e-20f;  // of D_t

// Number of runs in `tokens` consecutive tokens.
constexpr int64_t runs(int64_t tokens) { return ceil_div(tokens, kRun); }

// Workspaces, fp32: the runs' sums of shares [N, runs of a sequence, E] and the sequences' terms
// [N]; the runs' sums of squares. 0 for sizes that the ops refuse.
constexpr size_t loss_workspace_bytes(int64_t tokens, int64_t sequences, int32_t experts) {
  if (tokens < 0 || sequences < 1 || experts < 1) return 0;
  return sizeof(float) * size_t(sequences * (runs(tokens / sequences) * experts + 1));
}
constexpr size_t z_workspace_bytes(int64_t tokens) {
  return tokens < 0 ? 0 : sizeof(float) * size_t(runs(tokens));
}

// `scale` of the balance loss; computed on the host only.
template <class Params>
float loss_scale(const Params& p) {
  const double length = double(p.num_tokens) / double(p.num_sequences);
  const double slots = length * length * double(p.num_sequences) * p.top_k;
  return slots > 0 ? float(double(p.coefficient) * p.num_experts / slots) : 0.0f;
}

// coefficient over the number of valid tokens; any finite number where there is none: the sum is 0.
KIMI_HOST_DEVICE float z_scale(float coefficient, int32_t valid_tokens) {
  return coefficient / float(valid_tokens > 0 ? valid_tokens : 1);
}

// A sum over experts (or sequences) in the order above, for engines without vectors.
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
  // sums [E] = the sum of the shares of tokens [begin, end), in token order.
  void (*sum_shares)(const SequenceBalanceLossParams& p, int64_t begin, int64_t end, float* sums);
  // Rows [begin, end) of the gradient.
  void (*balance_gradient)(const SequenceBalanceLossBackwardParams& p, int64_t begin, int64_t end);
  // log_sum_exp of a run's tokens [begin, end); returns the sum of their squares, in token order.
  float (*sum_squares)(const ZLossParams& p, int64_t begin, int64_t end);
  void (*z_gradient)(const ZLossBackwardParams& p, int64_t begin, int64_t end);
};
KIMI_CPU_ENGINES(CpuEngine);

}  // namespace balance
}  // namespace kimi
