// SPDX-License-Identifier: MIT
// balance: argument checks, choice of the engine, threads over runs of tokens, and the sums over
// runs, which are short.
#include "balance/balance.h"

#include <algorithm>
#include <atomic>

#include "balance/check.h"
#include "common/engine.h"
#include "cpu/parallel.h"

namespace kimi {
namespace {

using balance::kRun;

constexpr int kTokensPerThread = 16;  // below about 3 us of work a second thread does not pay

// ---- checks ------------------------------------------------------------------------------------

template <class Params>
Status check_pointer(const char* op, const Params& p) {
  if (p.num_tokens > 0 && !p.logits) return invalid(op, ": logits: expected a pointer, got NULL");
  return Status::ok();
}

Status check(const UpdateExpertBiasParams& p) {
  if (p.num_experts < 0)
    return invalid("update_expert_bias: num_experts: expected 0 or more, got ", p.num_experts);
  if (p.num_experts > 0 && (!p.bias || !p.tokens_per_expert))
    return invalid("update_expert_bias: bias, tokens_per_expert: expected pointers, got NULL");
  return Status::ok();
}

Status check(const SequenceBalanceLossParams& p) {
  const char* op = "sequence_balance_loss";
  KIMI_RETURN_IF_ERROR(balance::check_sequences(op, p));
  KIMI_RETURN_IF_ERROR(check_pointer(op, p));
  if (!p.loss || !p.tokens_per_expert || (p.num_tokens > 0 && (!p.indices || !p.workspace)))
    return invalid(op,
                   ": indices, loss, tokens_per_expert, workspace: expected pointers, got NULL");
  return Status::ok();
}

Status check(const SequenceBalanceLossBackwardParams& p) {
  const char* op = "sequence_balance_loss_backward";
  KIMI_RETURN_IF_ERROR(balance::check_sequences(op, p));
  KIMI_RETURN_IF_ERROR(check_pointer(op, p));
  if (p.num_tokens > 0 && (!p.grad_loss || !p.tokens_per_expert || !p.grad_logits))
    return invalid(op, ": grad_loss, tokens_per_expert, grad_logits: expected pointers, got NULL");
  return Status::ok();
}

Status check(const ZLossParams& p) {
  KIMI_RETURN_IF_ERROR(balance::check_rows("z_loss", p));
  KIMI_RETURN_IF_ERROR(check_pointer("z_loss", p));
  if (!p.loss || !p.valid_tokens || (p.num_tokens > 0 && (!p.log_sum_exp || !p.workspace)))
    return invalid(
        "z_loss: loss, log_sum_exp, valid_tokens, workspace: expected pointers, got NULL");
  return Status::ok();
}

Status check(const ZLossBackwardParams& p) {
  const char* op = "z_loss_backward";
  KIMI_RETURN_IF_ERROR(balance::check_rows(op, p));
  KIMI_RETURN_IF_ERROR(check_pointer(op, p));
  if (p.num_tokens > 0 && (!p.grad_loss || !p.log_sum_exp || !p.valid_tokens || !p.grad_logits))
    return invalid(
        op, ": grad_loss, log_sum_exp, valid_tokens, grad_logits: expected pointers, got NULL");
  return Status::ok();
}

// ---- CPU ---------------------------------------------------------------------------------------

template <class Count>
void update_expert_bias_cpu(const UpdateExpertBiasParams& p) {
  const Count* counts = static_cast<const Count*>(p.tokens_per_expert);
  int64_t total = 0, sum = 0;
  for (int64_t e = 0; e < p.num_experts; ++e) total += counts[e];
  const auto direction = [&](int64_t e) {
    const int64_t share = p.num_experts * int64_t{counts[e]};
    return int(total > share) - int(total < share);
  };
  for (int64_t e = 0; e < p.num_experts; ++e) sum += direction(e);
  const float mean = p.centered ? float(sum) / float(p.num_experts) : 0.0f;
  for (int64_t e = 0; e < p.num_experts; ++e) p.bias[e] += p.rate * (float(direction(e)) - mean);
}

// Adds the ids of tokens [begin, end), of one sequence, to its counts.
void count_ids(const SequenceBalanceLossParams& p, int64_t begin, int64_t end, int32_t* counts) {
  for (int64_t i = begin * p.top_k; i < end * p.top_k; ++i)
    if (uint32_t(p.indices[i]) < uint32_t(p.num_experts)) ++counts[p.indices[i]];
}

void sequence_balance_loss_cpu(const SequenceBalanceLossParams& p) {
  const balance::CpuEngine& engine = balance::kEngines.best();
  const int experts = p.num_experts;
  const int64_t length = p.num_tokens / p.num_sequences, runs = balance::runs(length);
  float* sums = static_cast<float*>(p.workspace);  // [N, runs, E]
  std::fill_n(p.tokens_per_expert, p.num_sequences * experts, 0);
  const int64_t grain = length > 0 ? std::max<int64_t>(1, kTokensPerThread / length) : 1;
  cpu::parallel_for(p.num_sequences * runs, grain, [&](int64_t first, int64_t last) {
    int32_t counts[KIMI_TOPK_GATE_MAX_EXPERTS] = {};
    for (int64_t i = first; i < last; ++i) {
      const int64_t sequence = i / runs, begin = sequence * length + i % runs * kRun;
      const int64_t end = std::min(begin + kRun, (sequence + 1) * length);
      engine.sum_shares(p, begin, end, sums + i * experts);
      count_ids(p, begin, end, counts);
      if (i + 1 < last && (i + 1) / runs == sequence) continue;
      int32_t* shared = p.tokens_per_expert + sequence * experts;
      for (int e = 0; e < experts; ++e)  // integer sums: the order of the threads is immaterial
        if (counts[e]) std::atomic_ref(shared[e]).fetch_add(counts[e]);
      std::fill_n(counts, experts, 0);
    }
  });
  balance::OrderedSum total;
  for (int64_t sequence = 0; sequence < p.num_sequences; ++sequence) {
    const int32_t* counts = p.tokens_per_expert + sequence * experts;
    float* shares = sums + sequence * runs * experts;  // the first run's, then their sum
    for (int64_t run = 1; run < runs; ++run)
      for (int e = 0; e < experts; ++e) shares[e] += shares[run * experts + e];
    balance::OrderedSum term;
    for (int e = 0; runs > 0 && e < experts; ++e) term.add(e, float(counts[e]) * shares[e]);
    total.add(sequence, term.total());
  }
  *p.loss = balance::loss_scale(p) * total.total();
}

void z_loss_cpu(const ZLossParams& p) {
  const balance::CpuEngine& engine = balance::kEngines.best();
  const int64_t runs = balance::runs(p.num_tokens);
  float* sums = static_cast<float*>(p.workspace);  // [runs]
  cpu::parallel_for(runs, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      sums[i] = engine.sum_squares(p, i * kRun, std::min((i + 1) * kRun, p.num_tokens));
  });
  int32_t valid = int32_t(p.num_tokens);
  if (p.valid) valid -= int32_t(std::count(p.valid, p.valid + p.num_tokens, uint8_t{0}));
  float total = 0.0f;
  for (int64_t i = 0; i < runs; ++i) total += sums[i];
  *p.valid_tokens = valid;
  *p.loss = balance::z_scale(p.coefficient, valid) * total;
}

}  // namespace

Status update_expert_bias(const UpdateExpertBiasParams& p, kimi_device device,
                          [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check(p));
  if (device == KIMI_DEVICE_CUDA)
    return KIMI_CUDA("update_expert_bias", update_expert_bias_cuda(p, stream));
  p.counts_are_int64 ? update_expert_bias_cpu<int64_t>(p) : update_expert_bias_cpu<int32_t>(p);
  return Status::ok();
}

size_t sequence_balance_loss_workspace_bytes(const SequenceBalanceLossParams& p, kimi_device) {
  return balance::loss_workspace_bytes(p.num_tokens, p.num_sequences, p.num_experts);
}

Status sequence_balance_loss(const SequenceBalanceLossParams& p, kimi_device device,
                             [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check(p));
  if (device == KIMI_DEVICE_CUDA)
    return KIMI_CUDA("sequence_balance_loss", sequence_balance_loss_cuda(p, stream));
  sequence_balance_loss_cpu(p);
  return Status::ok();
}

Status sequence_balance_loss_backward(const SequenceBalanceLossBackwardParams& p,
                                      kimi_device device, [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check(p));
  if (p.num_tokens == 0) return Status::ok();
  if (device == KIMI_DEVICE_CUDA)
    return KIMI_CUDA("sequence_balance_loss_backward",
                     sequence_balance_loss_backward_cuda(p, stream));
  const balance::CpuEngine& engine = balance::kEngines.best();
  cpu::parallel_for(p.num_tokens, kTokensPerThread,
                    [&](int64_t begin, int64_t end) { engine.balance_gradient(p, begin, end); });
  return Status::ok();
}

size_t z_loss_workspace_bytes(const ZLossParams& p, kimi_device) {
  return balance::z_workspace_bytes(p.num_tokens);
}

Status z_loss(const ZLossParams& p, kimi_device device, [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check(p));
  if (device == KIMI_DEVICE_CUDA) return KIMI_CUDA("z_loss", z_loss_cuda(p, stream));
  z_loss_cpu(p);
  return Status::ok();
}

Status z_loss_backward(const ZLossBackwardParams& p, kimi_device device,
                       [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check(p));
  if (p.num_tokens == 0) return Status::ok();
  if (device == KIMI_DEVICE_CUDA)
    return KIMI_CUDA("z_loss_backward", z_loss_backward_cuda(p, stream));
  const balance::CpuEngine& engine = balance::kEngines.best();
  cpu::parallel_for(p.num_tokens, kTokensPerThread,
                    [&](int64_t begin, int64_t end) { engine.z_gradient(p, begin, end); });
  return Status::ok();
}

}  // namespace kimi
