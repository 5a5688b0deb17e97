// SPDX-License-Identifier: MIT
#include "topk_gate/gate_plan.h"

#include "common/engine.h"
#include "permute/check.h"
#include "topk_gate/check.h"

namespace kimi {

size_t gate_plan_workspace_bytes(const GatePlanParams& p, kimi_device device) {
  return permute_plan_workspace_bytes(gate::plan_of(p), device);
}

Status gate_plan(const GatePlanParams& p, kimi_device device, [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(gate::check_arguments("gate_plan", p.gate));
  KIMI_RETURN_IF_ERROR(permutation::check_plan(gate::plan_of(p), "gate_plan"));
  if (!p.offsets || !p.workspace || (p.gate.num_tokens > 0 && (!p.row_map || !p.source)))
    return invalid("gate_plan: row_map, source, offsets, workspace: expected pointers, got NULL");
  if (device == KIMI_DEVICE_CUDA) return KIMI_CUDA("gate_plan", gate_plan_cuda(p, stream));
  KIMI_RETURN_IF_ERROR(topk_gate(p.gate, device, stream));
  return permute_plan(gate::plan_of(p), device, stream);
}

}  // namespace kimi
