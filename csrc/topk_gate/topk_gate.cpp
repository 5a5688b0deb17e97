// SPDX-License-Identifier: MIT
// topk_gate: argument checks, choice of the engine, and threads over tokens.
#include "topk_gate/topk_gate.h"

#include <algorithm>
#include <atomic>

#include "common/dtype.h"
#include "common/engine.h"
#include "cpu/parallel.h"
#include "topk_gate/check.h"

namespace kimi {
namespace {

constexpr int kTokensPerThread = 16;  // below about 3 us of work a second thread does not pay

Status check(const TopkGateBackwardParams& p) {
  const char* op = "topk_gate_backward";
  KIMI_RETURN_IF_ERROR(gate::check_given(op, p, "indices.shape[1]"));
  KIMI_RETURN_IF_ERROR(gate::check_pointers(op, p));
  if (p.num_tokens > 0 && (!p.grad_weights || !p.grad_logits))
    return invalid(op, ": grad_weights, grad_logits: expected pointers, got NULL");
  return Status::ok();
}

Status check(const TopkGateGivenParams& p) {
  const char* op = "topk_gate_given";
  KIMI_RETURN_IF_ERROR(gate::check_given(op, p, "ids.shape[1]"));
  KIMI_RETURN_IF_ERROR(gate::check_outputs(op, p));
  if (p.num_tokens > 0 && !p.given) return invalid(op, ": given: expected a pointer, got NULL");
  return Status::ok();
}

template <class Params>
void forward_cpu(const Params& p, void (*rows)(const Params&, int64_t, int64_t, int32_t*)) {
  std::fill_n(p.tokens_per_expert, p.num_experts, 0);
  cpu::parallel_for(p.num_tokens, kTokensPerThread, [&](int64_t begin, int64_t end) {
    int32_t counts[KIMI_TOPK_GATE_MAX_EXPERTS] = {};
    rows(p, begin, end, counts);
    for (int e = 0; e < p.num_experts; ++e)  // integer sums: the order of the threads is immaterial
      if (counts[e]) std::atomic_ref(p.tokens_per_expert[e]).fetch_add(counts[e]);
  });
}

}  // namespace

Status topk_gate(const TopkGateParams& p, kimi_device device, [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(gate::check_arguments("topk_gate", p));
  if (device == KIMI_DEVICE_CUDA) return KIMI_CUDA("topk_gate", topk_gate_cuda(p, stream));
  forward_cpu(p, gate::kEngines.best().forward);
  return Status::ok();
}

Status topk_gate_given(const TopkGateGivenParams& p, kimi_device device,
                       [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check(p));
  if (device == KIMI_DEVICE_CUDA)
    return KIMI_CUDA("topk_gate_given", topk_gate_given_cuda(p, stream));
  KIMI_RETURN_IF_ERROR(
      gate::check_ids("topk_gate_given", p.given, p.num_tokens * p.top_k, p.num_experts));
  forward_cpu(p, gate::kEngines.best().given);
  return Status::ok();
}

Status topk_gate_backward(const TopkGateBackwardParams& p, kimi_device device,
                          [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check(p));
  if (p.num_tokens == 0) return Status::ok();
  if (device == KIMI_DEVICE_CUDA)
    return KIMI_CUDA("topk_gate_backward", topk_gate_backward_cuda(p, stream));
  const gate::CpuEngine& engine = gate::kEngines.best();
  cpu::parallel_for(p.num_tokens, kTokensPerThread,
                    [&](int64_t begin, int64_t end) { engine.backward(p, begin, end); });
  return Status::ok();
}

}  // namespace kimi
