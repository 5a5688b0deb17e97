// SPDX-License-Identifier: MIT
#include "topk_gate/gate_plan.cuh"

namespace kimi::gate {

static_assert(kClusterTokens == kPlanWarps * kPlanBlocks);

Status gate_plan_sm90(const GatePlanParams& p, size_t smem_bytes, void* stream) {
  return launch_gate_plan<true>(p, smem_bytes, stream);
}

}  // namespace kimi::gate
