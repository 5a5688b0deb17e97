// SPDX-License-Identifier: MIT
// The balance of the experts' loads, and the router's losses.
#include "balance/check.h"
#include "bindings/xla/ops.h"
#include "grouped_gemm/check.h"

namespace kimi::xla {
namespace {

// Where sequences end, and which tokens count: after `num_sequences`.
template <class Params>
Status set_sequences(Frame& f, Params& p) {
  p.offsets = static_cast<const int32_t*>(f.optional("offsets", kS32, {p.num_sequences}));
  p.valid = static_cast<const uint8_t*>(f.optional("valid", kPred, {p.num_tokens}));
  if (!p.offsets || !f.reads()) return Status::ok();
  return check_offsets(f.op.c_str(), p.offsets, p.num_sequences, p.num_tokens);
}

// What the loss and its gradient take alike, from `logits` on.
template <class Params>
Status set_loss(Frame& f, Params& p) {
  set_logits(f, p);
  const Tensor& counts = f.next("tokens_per_expert", {kS32}, {kAny, p.num_experts});
  p.tokens_per_expert = counts.as<int32_t>();
  p.num_sequences = counts.size(0);
  p.sequence_tokens = f.next("sequence_tokens", {kS32}, {p.num_sequences}).template as<int32_t>();
  p.top_k = f.int32("k");
  set_score(f, p);
  p.coefficient = float(f.number("coefficient"));
  return set_sequences(f, p);
}

}  // namespace

Status update_expert_bias(Frame& f) {
  kimi_update_expert_bias_params p = {};
  const Tensor& bias = f.next("bias", {kF32}, {kAny});
  p.num_experts = bias.size(0);
  const Tensor& counts = f.next("tokens_per_expert", {kS32, kS64}, {p.num_experts});
  p.tokens_per_expert = counts.data;
  p.counts_are_int64 = counts.dtype == kS64;
  p.rate = float(f.number("rate"));
  p.centered = f.int32("centered");
  p.bias = f.over("bias", bias).as<float>();
  return f.run(kimi_update_expert_bias, p);
}

Status sequence_counts(Frame& f) {
  kimi_sequence_counts_params p = {};
  const Tensor& indices = f.next("indices", {kS32}, {kAny, kAny});
  p.indices = indices.as<int32_t>();
  p.num_tokens = indices.size(0);
  p.top_k = int32_t(indices.size(1));
  p.num_experts = f.int32("num_experts");
  p.num_sequences = f.integer("num_sequences");
  KIMI_RETURN_IF_ERROR(set_sequences(f, p));
  p.tokens_per_expert = f.out({kS32}, {p.num_sequences, p.num_experts}).as<int32_t>();
  p.sequence_tokens = f.out({kS32}, {p.num_sequences}).as<int32_t>();
  return f.run(kimi_sequence_counts, p);
}

Status sequence_balance_loss(Frame& f) {
  kimi_sequence_balance_loss_params p = {};
  KIMI_RETURN_IF_ERROR(set_loss(f, p));
  p.loss = f.out({kF32}, {}).as<float>();
  return f.run(kimi_sequence_balance_loss, p, kimi_sequence_balance_loss_workspace_bytes);
}

Status sequence_balance_loss_backward(Frame& f) {
  kimi_sequence_balance_loss_backward_params p = {};
  p.grad_loss = f.next("grad_loss", {kF32}, {}).as<float>();
  KIMI_RETURN_IF_ERROR(set_loss(f, p));
  set_grad_logits(f, p);
  return f.run(kimi_sequence_balance_loss_backward, p);
}

Status quantile_histogram(Frame& f) {
  kimi_quantile_histogram_params p = {};
  const Tensor& histogram = f.next("histogram", {kS32}, {kAny, kAny});
  set_logits(f, p);
  if (histogram.size(0) != p.num_experts) f.refuse("histogram: expected a row for each expert");
  p.num_bins = int32_t(histogram.size(1));
  p.cutoffs = f.next("cutoffs", {kF32}, {p.num_tokens}).as<float>();
  p.bounds = f.next("bounds", {kF32}, {2}).as<float>();
  p.valid = static_cast<const uint8_t*>(f.optional("valid", kPred, {p.num_tokens}));
  set_score(f, p);
  if (f.reads()) KIMI_RETURN_IF_ERROR(balance::check_bounds(f.op.c_str(), p.bounds));
  p.histogram = f.over("histogram", histogram).as<int32_t>();
  return f.run(kimi_quantile_histogram, p);
}

Status z_loss(Frame& f) {
  kimi_z_loss_params p = {};
  set_logits(f, p);
  p.valid = static_cast<const uint8_t*>(f.optional("valid", kPred, {p.num_tokens}));
  p.coefficient = float(f.number("coefficient"));
  p.loss = f.out({kF32}, {}).as<float>();
  p.log_sum_exp = f.out({kF32}, {p.num_tokens}).as<float>();
  p.valid_tokens = f.out({kS32}, {}).as<int32_t>();
  return f.run(kimi_z_loss, p, kimi_z_loss_workspace_bytes);
}

Status z_loss_backward(Frame& f) {
  kimi_z_loss_backward_params p = {};
  p.grad_loss = f.next("grad_loss", {kF32}, {}).as<float>();
  set_logits(f, p);
  p.log_sum_exp = f.next("log_sum_exp", {kF32}, {p.num_tokens}).as<float>();
  p.valid_tokens = f.next("valid_tokens", {kS32}, {}).as<int32_t>();
  p.coefficient = float(f.number("coefficient"));
  set_grad_logits(f, p);
  return f.run(kimi_z_loss_backward, p);
}

}  // namespace kimi::xla
