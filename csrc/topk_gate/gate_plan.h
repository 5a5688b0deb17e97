// SPDX-License-Identifier: MIT
// gate_plan: topk_gate, and permute_plan (align 1) of its ids, in one call: what stands between the
// router and the experts.
//
//   weights, indices, tokens_per_expert    those of topk_gate
//   row_map, source, offsets               those of permute_plan
//
// On CUDA few tokens need one launch: at decode the two launches and the memset before them are a
// twentieth of the layer's time. Bits and order are those of the two ops, which do the rest.
#pragma once

#include "permute/permute.h"
#include "topk_gate/topk_gate.h"

namespace kimi {

using GatePlanParams = kimi_gate_plan_params;

size_t gate_plan_workspace_bytes(const GatePlanParams& p, kimi_device device);
Status gate_plan(const GatePlanParams& p, kimi_device device, void* stream);

// gate_plan.cu. Arguments have been checked; every output is written whole, for T = 0 too.
Status gate_plan_cuda(const GatePlanParams& p, void* stream);

namespace gate {

// The plan's part of the arguments.
inline PermutePlanParams plan_of(const GatePlanParams& p) {
  PermutePlanParams plan{};
  plan.indices = p.gate.indices;
  plan.row_map = p.row_map;
  plan.source = p.source;
  plan.offsets = p.offsets;
  plan.tokens_per_expert = p.gate.tokens_per_expert;
  plan.workspace = p.workspace;
  plan.num_tokens = p.gate.num_tokens;
  plan.num_experts = p.gate.num_experts;
  plan.top_k = p.gate.top_k;
  plan.align = 1;
  return plan;
}

// gate_plan.cu. One launch for few tokens, or none, as `launched` says; without `offsets` of the gate
// alone, with no need of row_map, source and workspace.
Status launch_few(const GatePlanParams& p, bool& launched, void* stream);

// gate_plan_sm90.cu: up to kClusterTokens tokens.
inline constexpr int64_t kClusterTokens = 64;
Status gate_plan_sm90(const GatePlanParams& p, size_t smem_bytes, void* stream);

}  // namespace gate
}  // namespace kimi
