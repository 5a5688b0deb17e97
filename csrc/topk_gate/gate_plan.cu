// SPDX-License-Identifier: MIT
// How many launches a plan with its gate takes.
//
//   tokens    at most 16    at most 64             more
//   Hopper    one           one, of a cluster      memset, gate, plan (two above 4096 pairs)
//   others    one           memset, gate, plan
//
// With more than 896 experts it is memset, gate, plan everywhere.
#include "topk_gate/gate_plan.cuh"

namespace kimi {
namespace {

using namespace gate;

// Every GPU from sm_80 on gives a block as much.
constexpr size_t kMostShared = 96 * 1024;

size_t shared_bytes(const TopkGateParams& p) {
  const size_t experts = static_cast<size_t>(p.num_experts);
  const size_t keys = p.num_groups > 1 ? experts + static_cast<size_t>(p.num_groups) : 0;
  return sizeof(int32_t) * (2 * experts + kPlanWarps * keys);
}

}  // namespace

Status gate_plan_cuda(const GatePlanParams& p, void* stream) {
  int sm = 0;
  KIMI_RETURN_IF_ERROR(device_sm(sm));
  const size_t smem_bytes = shared_bytes(p.gate);
  if (smem_bytes <= kMostShared && p.gate.num_experts <= kPlanExperts) {
    if (sm / 10 == 9 && p.gate.num_tokens <= kClusterTokens)
      return gate_plan_sm90(p, smem_bytes, stream);
    if (p.gate.num_tokens <= kPlanWarps) return launch_gate_plan<false>(p, smem_bytes, stream);
  }
  KIMI_RETURN_IF_ERROR(topk_gate_cuda(p.gate, stream));
  return permute_plan_cuda(plan_of(p), stream);
}

}  // namespace kimi
