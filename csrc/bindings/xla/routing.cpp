// SPDX-License-Identifier: MIT
// The router's and the rows' ops: arguments of python/kimi_ops/jax in order, then its attributes.
#include "bindings/xla/ops.h"

namespace kimi::xla {
namespace {

constexpr std::initializer_list<const char*> kScoreFunctions = {"sigmoid", "softmax",
                                                                "sqrtsoftplus"};

template <class Params>
void set_logits(Frame& f, Params& p) {
  const Tensor& logits = f.next("logits", kFloats, {kAny, kAny});
  p.logits = logits.data;
  p.num_tokens = logits.size(0);
  p.num_experts = int32_t(logits.size(1));
  p.logits_stride = logits.size(1);
  p.logits_dtype = native(logits.dtype);
}

template <class Params>
void set_score(Frame& f, Params& p) {
  p.score_function = kimi_score_function(f.choice("score_function", kScoreFunctions));
}

template <class Params>
void set_weighting(Frame& f, Params& p) {
  set_score(f, p);
  p.renormalize = int32_t(f.integer("renormalize"));
  p.scaling_factor = float(f.number("scaling_factor"));
}

}  // namespace

Status topk_gate(Frame& f) {
  kimi_topk_gate_params p = {};
  set_logits(f, p);
  p.expert_bias = static_cast<const float*>(f.optional("expert_bias", kF32, {p.num_experts}));
  p.valid = static_cast<const uint8_t*>(f.optional("valid", kPred, {p.num_tokens}));
  p.top_k = f.int32("k");
  set_weighting(f, p);
  p.num_groups = f.int32("num_groups");
  p.topk_groups = f.int32("topk_groups");
  p.group_score_topk = f.int32("group_score_topk");
  p.weights = f.out({kF32}, {p.num_tokens, p.top_k}).as<float>();
  p.indices = f.out({kS32}, {p.num_tokens, p.top_k}).as<int32_t>();
  p.tokens_per_expert = f.out({kS32}, {p.num_experts}).as<int32_t>();
  return f.run(kimi_topk_gate, p);
}

Status topk_gate_backward(Frame& f) {
  kimi_topk_gate_backward_params p = {};
  const Tensor& grad = f.next("grad_weights", {kF32}, {kAny, kAny});
  set_logits(f, p);
  p.grad_weights = grad.as<float>();
  p.top_k = int32_t(grad.size(1));
  p.indices = f.next("indices", {kS32}, {p.num_tokens, p.top_k}).as<int32_t>();
  if (grad.size(0) != p.num_tokens) f.refuse("grad_weights: expected a row for each token");
  set_weighting(f, p);
  p.grad_logits = f.out(kFloats, {p.num_tokens, p.num_experts}).data;
  return f.run(kimi_topk_gate_backward, p);
}

Status update_expert_bias(Frame& f) {
  kimi_update_expert_bias_params p = {};
  const Tensor& bias = f.next("bias", {kF32}, {kAny});  // the result's memory, too
  p.num_experts = bias.size(0);
  const Tensor& counts = f.next("tokens_per_expert", {kS32, kS64}, {p.num_experts});
  p.tokens_per_expert = counts.data;
  p.counts_are_int64 = counts.dtype == kS64;
  p.rate = float(f.number("rate"));
  p.centered = int32_t(f.integer("centered"));
  p.bias = f.out({kF32}, {p.num_experts}).as<float>();
  if (!f.traced && p.bias != bias.data) f.refuse("bias: expected the memory of the result");
  return f.run(kimi_update_expert_bias, p);
}

Status sequence_balance_loss(Frame& f) {
  kimi_sequence_balance_loss_params p = {};
  set_logits(f, p);
  const Tensor& indices = f.next("indices", {kS32}, {p.num_tokens, kAny});
  p.top_k = int32_t(indices.size(1));
  p.num_sequences = f.integer("num_sequences");
  set_score(f, p);
  p.coefficient = float(f.number("coefficient"));
  p.loss = f.out({kF32}, {}).as<float>();
  kimi_sequence_counts_params counts = {};
  counts.indices = indices.as<int32_t>();
  counts.tokens_per_expert = f.out({kS32}, {p.num_sequences, p.num_experts}).as<int32_t>();
  counts.sequence_tokens = f.out({kS32}, {p.num_sequences}).as<int32_t>();
  counts.num_tokens = p.num_tokens;
  counts.num_sequences = p.num_sequences;
  counts.num_experts = p.num_experts;
  counts.top_k = p.top_k;
  p.tokens_per_expert = counts.tokens_per_expert;
  p.sequence_tokens = counts.sequence_tokens;
  KIMI_RETURN_IF_ERROR(f.run(kimi_sequence_counts, counts));
  return f.run(kimi_sequence_balance_loss, p, kimi_sequence_balance_loss_workspace_bytes);
}

Status sequence_balance_loss_backward(Frame& f) {
  kimi_sequence_balance_loss_backward_params p = {};
  p.grad_loss = f.next("grad_loss", {kF32}, {}).as<float>();
  set_logits(f, p);
  const Tensor& counts = f.next("tokens_per_expert", {kS32}, {kAny, p.num_experts});
  p.tokens_per_expert = counts.as<int32_t>();
  p.num_sequences = counts.size(0);
  p.sequence_tokens = f.next("sequence_tokens", {kS32}, {p.num_sequences}).as<int32_t>();
  p.top_k = f.int32("k");
  set_score(f, p);
  p.coefficient = float(f.number("coefficient"));
  p.grad_logits = f.out(kFloats, {p.num_tokens, p.num_experts}).data;
  return f.run(kimi_sequence_balance_loss_backward, p);
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
  p.grad_logits = f.out(kFloats, {p.num_tokens, p.num_experts}).data;
  return f.run(kimi_z_loss_backward, p);
}

Status permute_plan(Frame& f) {
  kimi_permute_plan_params p = {};
  const Tensor& indices = f.next("indices", {kS32}, {kAny, kAny});
  p.indices = indices.as<int32_t>();
  p.num_tokens = indices.size(0);
  p.top_k = int32_t(indices.size(1));
  p.num_experts = f.int32("num_experts");
  p.align = f.int32("align");
  const int64_t rows = indices.count() + int64_t{p.num_experts} * (p.align - 1);
  p.row_map = f.out({kS32}, {p.num_tokens, p.top_k}).as<int32_t>();
  p.source = f.out({kS32}, {rows}).as<int32_t>();
  p.offsets = f.out({kS32}, {p.num_experts}).as<int32_t>();
  p.tokens_per_expert = f.out({kS32}, {p.num_experts}).as<int32_t>();
  return f.run(kimi_permute_plan, p, kimi_permute_plan_workspace_bytes);
}

Status permute(Frame& f) {
  kimi_permute_params p = {};
  const Tensor& x = f.next("x", kFloats, {kAny, kAny});
  const Tensor& row_map = f.next("row_map", {kS32}, {x.size(0), kAny});
  const Tensor& source = f.next("source", {kS32}, {kAny});
  p.x = x.data;
  p.row_map = row_map.as<int32_t>();
  p.source = source.as<int32_t>();
  p.num_tokens = x.size(0);
  p.num_rows = source.size(0);
  p.row_bytes = p.x_stride_bytes = x.size(1) * (x.dtype == kF32 ? 4 : 2);
  p.top_k = int32_t(row_map.size(1));
  p.y = f.out({x.dtype}, {p.num_rows, x.size(1)}).data;
  return f.run(kimi_permute, p);
}

Status unpermute(Frame& f) {
  kimi_unpermute_params p = {};
  const Tensor& y = f.next("y", kFloats, {kAny, kAny});
  const Tensor& row_map = f.next("row_map", {kS32}, {kAny, kAny});
  p.y = y.data;
  p.row_map = row_map.as<int32_t>();
  p.num_tokens = row_map.size(0);
  p.top_k = int32_t(row_map.size(1));
  p.weights = static_cast<const float*>(f.optional("weights", kF32, {p.num_tokens, p.top_k}));
  p.hidden = p.y_stride = y.size(1);
  p.dtype = native(y.dtype);
  p.x = f.out({y.dtype}, {p.num_tokens, p.hidden}).data;
  return f.run(kimi_unpermute, p);
}

Status unpermute_backward(Frame& f) {
  kimi_unpermute_backward_params p = {};
  const Tensor& grad_x = f.next("grad_x", kFloats, {kAny, kAny});
  const Tensor& y = f.next("y", {grad_x.dtype}, {kAny, grad_x.size(1)});
  const Tensor& row_map = f.next("row_map", {kS32}, {grad_x.size(0), kAny});
  p.num_tokens = grad_x.size(0);
  p.num_rows = y.size(0);
  p.top_k = int32_t(row_map.size(1));
  p.hidden = p.grad_x_stride = p.y_stride = grad_x.size(1);
  p.grad_x = grad_x.data;
  p.y = y.data;
  p.row_map = row_map.as<int32_t>();
  p.source = f.next("source", {kS32}, {p.num_rows}).as<int32_t>();
  p.weights = f.next("weights", {kF32}, {p.num_tokens, p.top_k}).as<float>();
  p.dtype = native(y.dtype);
  p.grad_y = f.out({y.dtype}, {p.num_rows, p.hidden}).data;
  p.grad_weights = f.out({kF32}, {p.num_tokens, p.top_k}).as<float>();
  return f.run(kimi_unpermute_backward, p);
}

Status sort_chunks(Frame& f) {
  kimi_sort_chunks_params p = {};
  const Tensor& x = f.next("x", kFloats, {kAny, kAny});
  const Tensor& sizes = f.next("split_sizes", {kS32}, {kAny});
  p.x = x.data;
  p.split_sizes = sizes.as<int32_t>();
  p.num_chunks = int32_t(sizes.size(0));
  p.order = f.next("order", {kS32}, {p.num_chunks}).as<int32_t>();
  p.num_rows = x.size(0);
  p.row_bytes = p.x_stride_bytes = x.size(1) * (x.dtype == kF32 ? 4 : 2);
  p.inverse = f.int32("inverse");
  p.y = f.out({x.dtype}, {x.size(0), x.size(1)}).data;
  return f.run(kimi_sort_chunks, p);
}

}  // namespace kimi::xla
