// SPDX-License-Identifier: MIT
// topk_gate: which K of E experts a token goes to, and with what weights.
//
//   s[t,e] = score(logits[t,e])                 sigmoid | softmax over e | sqrt(softplus), fp32
//   c[t,e] = s[t,e] + expert_bias[e]            choice score: selects, never weighs; a NaN logit
//            or logits[t,e] + expert_bias[e]    chooses as -inf and scores 0 (select_logits)
//   groups: E experts in num_groups equal runs; a group scores the sum of its group_score_topk best
//           c (added best first); experts outside the topk_groups best groups cannot be chosen
//   indices[t,:] = the K largest c, descending; equal c: lower id first (groups alike)
//   u = s[t, indices[t,:]];  D = ((u_0 + u_1) + ...) + 1e-20, in slot order
//   weights[t,j] = u_j * (scaling_factor / D)   or u_j * scaling_factor without renormalize
//   tokens_per_expert[e] = how often e stands in indices
//   valid[t] = 0: indices -1, weights 0, not counted; its logits are not read
//
// Given (the ids come from elsewhere: recorded, hashed, forced): indices[t,j] = given[t,j], or -1 where
// that is outside 0..E-1; such a slot has u = 0, weight 0 and is not counted. The rest is as above.
//
// Backward (indices and groups are constants, the bias gets no gradient), g = d weights:
//   du_j = (g_j - (sum_i g_i u_i) / D) * scaling_factor / D    or g_j * scaling_factor
//   dz_j = du_j * slope(s_j) at the chosen experts, 0 elsewhere; softmax:
//   dz_e = s_e * (du_e - sum_j du_j u_j), du_e = 0 for experts that were not chosen
//   A slot whose index is outside 0..E-1 (the -1 of a dropped token, or any other) takes no part:
//   u = g = du = 0, and nothing is written for it. Slots of one expert add up, in slot order.
//
// Cost: T*E logits read once, T*K*8 bytes written. About 30 fp32 instructions a score: the arithmetic
// leads on a CPU core, and did on a GPU, where estimates now leave a few experts to score (filter.h).
// Sources: DeepSeek-V3 (arXiv 2412.19437, eq. 12-16), Kimi K2 (arXiv 2507.20534).
#pragma once

#include <cstdint>

#include "common/status.h"
#include "cpu/engines.h"

namespace kimi {

using TopkGateParams = kimi_topk_gate_params;
using TopkGateGivenParams = kimi_topk_gate_given_params;
using TopkGateBackwardParams = kimi_topk_gate_backward_params;

Status topk_gate(const TopkGateParams& p, kimi_device device, void* stream);
Status topk_gate_given(const TopkGateGivenParams& p, kimi_device device, void* stream);
Status topk_gate_backward(const TopkGateBackwardParams& p, kimi_device device, void* stream);

// topk_gate.cu. Arguments have been checked; T > 0.
Status topk_gate_cuda(const TopkGateParams& p, void* stream);
Status topk_gate_given_cuda(const TopkGateGivenParams& p, void* stream);
Status topk_gate_backward_cuda(const TopkGateBackwardParams& p, void* stream);

namespace gate {

// One CPU engine: rows [begin, end) in the calling thread. `counts` [E] is added to.
struct CpuEngine {
  void (*forward)(const TopkGateParams& p, int64_t begin, int64_t end, int32_t* counts);
  void (*given)(const TopkGateGivenParams& p, int64_t begin, int64_t end, int32_t* counts);
  void (*backward)(const TopkGateBackwardParams& p, int64_t begin, int64_t end);
  // What the filter (filter.h) takes for the sigmoid of n logits, and its error; nullptr: no filter.
  void (*estimate)(const float* logits, int64_t n, float* estimates);
  float error;
};
KIMI_CPU_ENGINES(CpuEngine);

// kept [num_groups]: the groups whose experts take part, from the choice scores [E] of one row.
void select_groups(const TopkGateParams& p, const float* choice, bool* kept);

}  // namespace gate
}  // namespace kimi
