// SPDX-License-Identifier: MIT
// topk_gate: argument checks, choice of the engine, and threads over tokens.
#include "topk_gate/topk_gate.h"

#include <algorithm>
#include <atomic>

#include "common/dtype.h"
#include "common/engine.h"
#include "cpu/parallel.h"

namespace kimi {
namespace {

constexpr int kTokensPerThread = 16;  // below about 3 us of work a second thread does not pay

template <class Params>
Status check_common(const char* op, const Params& p) {
  if (p.num_tokens < 0) return invalid(op, ": num_tokens: expected 0 or more, got ", p.num_tokens);
  if (p.num_experts < 1 || p.num_experts > KIMI_TOPK_GATE_MAX_EXPERTS)
    return invalid(op, ": num_experts: expected 1..", KIMI_TOPK_GATE_MAX_EXPERTS, ", got ",
                   p.num_experts);
  if (p.top_k < 1 || p.top_k > std::min(p.num_experts, KIMI_TOPK_GATE_MAX_K))
    return invalid(op, ": top_k: expected 1..", std::min(p.num_experts, KIMI_TOPK_GATE_MAX_K),
                   " (at most ", KIMI_TOPK_GATE_MAX_K, " and the ", p.num_experts,
                   " experts), got ", p.top_k);
  if (!is_dtype(p.logits_dtype))
    return invalid(op, ": logits_dtype: expected a kimi_dtype (0..2), got ", int(p.logits_dtype));
  if (p.score_function < KIMI_SCORE_SIGMOID || p.score_function > KIMI_SCORE_SQRTSOFTPLUS)
    return invalid(op, ": score_function: expected a kimi_score_function (0..2), got ",
                   int(p.score_function));
  if (p.num_tokens > 0 && (!p.logits || !p.indices))
    return invalid(op, ": logits, indices: expected pointers, got NULL");
  if (p.logits_stride < 0)
    return invalid(op, ": logits_stride: expected 0 or more elements, got ", p.logits_stride);
  return Status::ok();
}

Status check(const TopkGateParams& p) {
  KIMI_RETURN_IF_ERROR(check_common("topk_gate", p));
  if (p.num_groups < 1 || p.num_experts % p.num_groups != 0)
    return invalid("topk_gate: num_groups: expected a divisor of num_experts = ", p.num_experts,
                   ", got ", p.num_groups);
  const int group_size = p.num_experts / p.num_groups;
  if (p.topk_groups < 1 || p.topk_groups > p.num_groups)
    return invalid("topk_gate: topk_groups: expected 1..num_groups = ", p.num_groups, ", got ",
                   p.topk_groups);
  if (p.top_k > p.topk_groups * group_size)
    return invalid("topk_gate: top_k: ", p.top_k, " experts cannot be chosen from ", p.topk_groups,
                   " groups of ", group_size, "; raise topk_groups or lower top_k");
  if (p.num_groups > 1 && (p.group_score_topk < 1 || p.group_score_topk > group_size))
    return invalid("topk_gate: group_score_topk: expected 1..", group_size,
                   " (the experts of a group), got ", p.group_score_topk);
  if (!p.tokens_per_expert || (p.num_tokens > 0 && !p.weights))
    return invalid("topk_gate: weights, tokens_per_expert: expected pointers, got NULL");
  return Status::ok();
}

Status check(const TopkGateBackwardParams& p) {
  KIMI_RETURN_IF_ERROR(check_common("topk_gate_backward", p));
  if (p.num_tokens > 0 && (!p.grad_weights || !p.grad_logits))
    return invalid("topk_gate_backward: grad_weights, grad_logits: expected pointers, got NULL");
  return Status::ok();
}

void forward_cpu(const TopkGateParams& p) {
  const gate::CpuEngine& engine = gate::kEngines.best();
  std::fill_n(p.tokens_per_expert, p.num_experts, 0);
  cpu::parallel_for(p.num_tokens, kTokensPerThread, [&](int64_t begin, int64_t end) {
    int32_t counts[KIMI_TOPK_GATE_MAX_EXPERTS] = {};
    engine.forward(p, begin, end, counts);
    for (int e = 0; e < p.num_experts; ++e)  // integer sums: the order of the threads is immaterial
      if (counts[e]) std::atomic_ref(p.tokens_per_expert[e]).fetch_add(counts[e]);
  });
}

}  // namespace

Status topk_gate(const TopkGateParams& p, kimi_device device, [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check(p));
  if (device == KIMI_DEVICE_CUDA) return KIMI_CUDA("topk_gate", topk_gate_cuda(p, stream));
  forward_cpu(p);
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
