// SPDX-License-Identifier: MIT
// How many launches a gate takes, and a plan with its gate.
//
//   tokens             at most 16    at most 64             more
//   Hopper, gate       one           one, of a cluster      memset, gate
//   others, gate       one           memset, gate           memset, gate
//   with the plan      one where the gate is one, else beside the gate those of permute_plan.cu
#include "topk_gate/gate_plan.cuh"

namespace kimi {
namespace {

using namespace gate;

// Every GPU from sm_80 on gives a block as much.
constexpr size_t kMostShared = 96 * 1024;

size_t shared_bytes(const TopkGateParams& p) {
  const size_t experts = static_cast<size_t>(p.num_experts);
  return sizeof(int32_t) *
         (2 * experts + kPlanWarps * (experts + static_cast<size_t>(p.num_groups)));
}

}  // namespace

namespace gate {

Status launch_few(const GatePlanParams& p, bool& launched, void* stream) {
  int sm = 0;
  KIMI_RETURN_IF_ERROR(device_sm(sm));
  const bool cluster = sm / 10 == 9;
  const size_t smem_bytes = shared_bytes(p.gate);
  launched =
      smem_bytes <= kMostShared && p.gate.num_tokens <= (cluster ? kClusterTokens : kPlanWarps);
  if (!launched) return Status::ok();
  if (cluster) return gate_plan_sm90(p, smem_bytes, stream);
  return launch_gate_plan<false>(p, smem_bytes, stream);
}

}  // namespace gate

Status gate_plan_cuda(const GatePlanParams& p, void* stream) {
  bool launched = false;
  KIMI_RETURN_IF_ERROR(launch_few(p, launched, stream));
  if (launched) return Status::ok();
  KIMI_RETURN_IF_ERROR(topk_gate_cuda(p.gate, stream));
  return permute_plan_cuda(plan_of(p), stream);
}

}  // namespace kimi
