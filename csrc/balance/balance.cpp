// SPDX-License-Identifier: MIT
// balance: argument checks, choice of the engine, threads over runs of tokens, and what is integers.
#include "balance/balance.h"

#include <algorithm>
#include <atomic>

#include "balance/check.h"
#include "common/engine.h"
#include "cpu/parallel.h"
#include "cpu/vec_portable.h"

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

Status check(const SequenceCountsParams& p) {
  const char* op = "sequence_counts";
  KIMI_RETURN_IF_ERROR(balance::check_counts(op, p));
  if (!p.tokens_per_expert || !p.sequence_tokens || (p.num_tokens > 0 && !p.indices))
    return invalid(op,
                   ": indices, tokens_per_expert, sequence_tokens: expected pointers, got NULL");
  return Status::ok();
}

Status check(const SequenceBalanceLossParams& p) {
  const char* op = "sequence_balance_loss";
  KIMI_RETURN_IF_ERROR(balance::check_loss(op, p));
  KIMI_RETURN_IF_ERROR(check_pointer(op, p));
  if (!p.loss || (p.num_tokens > 0 && (!p.tokens_per_expert || !p.sequence_tokens || !p.workspace)))
    return invalid(
        op, ": loss, tokens_per_expert, sequence_tokens, workspace: expected pointers, got NULL");
  return Status::ok();
}

Status check(const SequenceBalanceLossBackwardParams& p) {
  const char* op = "sequence_balance_loss_backward";
  KIMI_RETURN_IF_ERROR(balance::check_loss(op, p));
  KIMI_RETURN_IF_ERROR(check_pointer(op, p));
  if (p.num_tokens > 0 &&
      (!p.grad_loss || !p.tokens_per_expert || !p.sequence_tokens || !p.grad_logits))
    return invalid(op,
                   ": grad_loss, tokens_per_expert, sequence_tokens, grad_logits: expected "
                   "pointers, got NULL");
  return Status::ok();
}

Status check(const QuantileHistogramParams& p) {
  const char* op = "quantile_histogram";
  KIMI_RETURN_IF_ERROR(balance::check_bins(op, p));
  KIMI_RETURN_IF_ERROR(check_pointer(op, p));
  if (p.num_tokens > 0 && (!p.cutoffs || !p.bounds || !p.histogram))
    return invalid(op, ": cutoffs, bounds, histogram: expected pointers, got NULL");
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

// Integer sums: the order of the threads is immaterial.
void add(int32_t& shared, int32_t count) {
  if (count) std::atomic_ref(shared).fetch_add(count, std::memory_order_relaxed);
}

void sequence_counts_cpu(const SequenceCountsParams& p) {
  const int experts = p.num_experts;
  std::fill_n(p.tokens_per_expert, p.num_sequences * experts, 0);
  std::fill_n(p.sequence_tokens, p.num_sequences, 0);
  cpu::parallel_for(p.num_tokens, 16 * kTokensPerThread, [&](int64_t begin, int64_t end) {
    int32_t counts[KIMI_TOPK_GATE_MAX_EXPERTS] = {}, tokens = 0;
    int64_t sequence = -1;  // whose counts they are
    const auto hand_over = [&] {
      if (tokens == 0) return;
      add(p.sequence_tokens[sequence], tokens);
      for (int e = 0; e < experts; ++e) add(p.tokens_per_expert[sequence * experts + e], counts[e]);
      std::fill_n(counts, experts, 0);
      tokens = 0;
    };
    for (int64_t t = begin; t < end; ++t) {
      const int64_t own = balance::sequence_of(p, t);
      if (own < 0) continue;
      if (own != sequence) hand_over();
      sequence = own;
      ++tokens;
      for (int64_t i = t * p.top_k; i < (t + 1) * p.top_k; ++i)
        if (uint32_t(p.indices[i]) < uint32_t(experts)) ++counts[p.indices[i]];
    }
    hand_over();
  });
}

// The sum of run(begin, end) over the runs, in order; `sums` [runs].
template <class Run>
float sum_runs(int64_t tokens, void* workspace, const Run& run) {
  const int64_t runs = balance::runs(tokens);
  float* sums = static_cast<float*>(workspace);
  cpu::parallel_for(runs, 1, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      sums[i] = run(i * kRun, std::min((i + 1) * kRun, tokens));
  });
  float total = 0.0f;
  for (int64_t i = 0; i < runs; ++i) total += sums[i];
  return total;
}

void sequence_balance_loss_cpu(const SequenceBalanceLossParams& p) {
  const balance::CpuEngine& engine = balance::kEngines.best();
  *p.loss = balance::loss_scale(p) *
            sum_runs(p.num_tokens, p.workspace,
                     [&](int64_t begin, int64_t end) { return engine.sum_terms(p, begin, end); });
}

void quantile_histogram_cpu(const QuantileHistogramParams& p) {
  const balance::CpuEngine& engine = balance::kEngines.best();
  const float low = p.bounds[0], per_unit = float(p.num_bins) / (p.bounds[1] - low);
  // A thread counts for its own experts: it scores whole rows again, which costs less than atomics.
  cpu::parallel_for(p.num_experts, 32, [&](int64_t first, int64_t last) {
    alignas(64) float s[KIMI_TOPK_GATE_MAX_EXPERTS + 16];
    for (int64_t t = 0; t < p.num_tokens; ++t) {
      if (p.valid && !p.valid[t]) continue;
      engine.scores(p, t, s);
      for (int64_t e = first; e < last; ++e) {
        const float r = p.cutoffs[t] - s[e];
        ++p.histogram[e * p.num_bins +
                      balance::bin_of<cpu::Portable>(r, low, per_unit, p.num_bins)];
      }
    }
  });
}

void z_loss_cpu(const ZLossParams& p) {
  const balance::CpuEngine& engine = balance::kEngines.best();
  int32_t valid = int32_t(p.num_tokens);
  if (p.valid) valid -= int32_t(std::count(p.valid, p.valid + p.num_tokens, uint8_t{0}));
  *p.valid_tokens = valid;
  *p.loss = balance::z_scale(p.coefficient, valid) *
            sum_runs(p.num_tokens, p.workspace,
                     [&](int64_t begin, int64_t end) { return engine.sum_squares(p, begin, end); });
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
  return balance::workspace_bytes(p.num_tokens);
}

Status sequence_counts(const SequenceCountsParams& p, kimi_device device,
                       [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check(p));
  if (device == KIMI_DEVICE_CUDA)
    return KIMI_CUDA("sequence_counts", sequence_counts_cuda(p, stream));
  sequence_counts_cpu(p);
  return Status::ok();
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
  return balance::workspace_bytes(p.num_tokens);
}

Status quantile_histogram(const QuantileHistogramParams& p, kimi_device device,
                          [[maybe_unused]] void* stream) {
  KIMI_RETURN_IF_ERROR(check(p));
  if (p.num_tokens == 0) return Status::ok();
  if (device == KIMI_DEVICE_CUDA)
    return KIMI_CUDA("quantile_histogram", quantile_histogram_cuda(p, stream));
  quantile_histogram_cpu(p);
  return Status::ok();
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
