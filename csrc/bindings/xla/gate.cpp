// SPDX-License-Identifier: MIT
// The router's choice.
#include "bindings/xla/ops.h"

namespace kimi::xla {
namespace {

template <class Params>
void set_weighting(Frame& f, Params& p) {
  set_score(f, p);
  p.renormalize = f.int32("renormalize");
  p.scaling_factor = float(f.number("scaling_factor"));
}

template <class Params>
void set_valid(Frame& f, Params& p) {
  p.valid = static_cast<const uint8_t*>(f.optional("valid", kPred, {p.num_tokens}));
}

template <class Params>
void set_outputs(Frame& f, Params& p) {
  p.weights = f.out({kF32}, {p.num_tokens, p.top_k}).template as<float>();
  p.indices = f.out({kS32}, {p.num_tokens, p.top_k}).template as<int32_t>();
  p.tokens_per_expert = f.out({kS32}, {p.num_experts}).template as<int32_t>();
}

// What topk_gate and gate_plan take and give alike.
kimi_topk_gate_params gate_of(Frame& f) {
  kimi_topk_gate_params p = {};
  set_logits(f, p);
  p.expert_bias = static_cast<const float*>(f.optional("expert_bias", kF32, {p.num_experts}));
  set_valid(f, p);
  p.top_k = f.int32("k");
  set_weighting(f, p);
  p.num_groups = f.int32("num_groups");
  p.topk_groups = f.int32("topk_groups");
  p.group_score_topk = f.int32("group_score_topk");
  p.select_logits = f.choice("select", {"scores", "logits"});
  set_outputs(f, p);
  return p;
}

}  // namespace

Status topk_gate(Frame& f) {
  const kimi_topk_gate_params p = gate_of(f);
  return f.run(kimi_topk_gate, p);
}

Status gate_plan(Frame& f) {
  kimi_gate_plan_params p = {};
  p.gate = gate_of(f);
  const int64_t tokens = p.gate.num_tokens, k = p.gate.top_k;
  p.row_map = f.out({kS32}, {tokens, k}).as<int32_t>();
  p.source = f.out({kS32}, {tokens * k}).as<int32_t>();
  p.offsets = f.out({kS32}, {p.gate.num_experts}).as<int32_t>();
  return f.run(kimi_gate_plan, p, kimi_gate_plan_workspace_bytes);
}

Status topk_gate_given(Frame& f) {
  kimi_topk_gate_given_params p = {};
  set_logits(f, p);
  const Tensor& ids = f.next("ids", {kS32}, {p.num_tokens, kAny});
  p.given = ids.as<int32_t>();
  p.top_k = int32_t(ids.size(1));
  set_valid(f, p);
  set_weighting(f, p);
  set_outputs(f, p);
  return f.run(kimi_topk_gate_given, p);
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
  set_grad_logits(f, p);
  return f.run(kimi_topk_gate_backward, p);
}

}  // namespace kimi::xla
