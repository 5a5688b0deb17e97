// SPDX-License-Identifier: MIT
#include "bindings/ops.h"
#include "topk_gate/check.h"

namespace kimi::bindings {
namespace {

// What topk_gate and gate_plan take and give alike.
struct Gate {
  kimi_topk_gate_params p;
  Output weights, indices, counts;
};

Gate gate_of(Call& call) {
  const Tensor logits = call.tensor("logits").of(kNatives).shape({"T", "E"}, kFlatten).dense_rows();
  kimi_topk_gate_params p = {};
  p.top_k = call.int32("k");
  p.score_function = call.choice<kimi_score_function>("score_function", kScoreFunctions);
  const Tensor bias = call.optional("expert_bias");
  p.num_groups = call.int32("num_groups");
  p.topk_groups = call.int32("topk_groups");
  p.group_score_topk = call.int32("group_score_topk");
  p.renormalize = call.truth();
  p.scaling_factor = float(call.number("scaling_factor"));
  const Tensor valid = call.optional("valid");
  p.select_logits = call.choice("select", {"scores", "logits"});
  set_logits(p, logits);
  call.check(gate::check_options(std::string(call.op).c_str(), p));
  if (bias) {
    bias.of({kFloat32}, "keep the bias in float32: bfloat16 cannot hold steps of 0.001");
    p.expert_bias = bias.shape({p.num_experts}).dense().data<float>();
  }
  if (valid) p.valid = valid_of(valid, logits);
  const Output weights = call.empty(kFloat32, {p.num_tokens, p.top_k});
  const Output indices = call.empty(kInt32, {p.num_tokens, p.top_k});
  const Output counts = call.empty(kInt32, {p.num_experts});
  p.weights = weights.data<float>();
  p.indices = indices.data<int32_t>();
  p.tokens_per_expert = counts.data<int32_t>();
  return {p, weights, indices, counts};
}

PyObject* topk_gate(Call& call) {
  const Gate gate = gate_of(call);
  call.run(kimi_topk_gate, gate.p);
  return call.result({gate.weights, gate.indices, gate.counts});
}

PyObject* gate_plan(Call& call) {
  const Gate gate = gate_of(call);
  kimi_gate_plan_params p = {};
  p.gate = gate.p;
  const Output row_map = call.empty(kInt32, {gate.p.num_tokens, gate.p.top_k});
  const Output source = call.empty(kInt32, {gate.p.num_tokens * gate.p.top_k});
  const Output offsets = call.empty(kInt32, {gate.p.num_experts});
  p.row_map = row_map.data<int32_t>();
  p.source = source.data<int32_t>();
  p.offsets = offsets.data<int32_t>();
  call.workspace(p, kimi_gate_plan_workspace_bytes);
  call.run(kimi_gate_plan, p);
  return call.result({gate.weights, gate.indices, gate.counts, row_map, source, offsets});
}

PyObject* topk_gate_given(Call& call) {
  const Tensor logits = call.tensor("logits").of(kNatives).shape({"T", "E"}, kFlatten).dense_rows();
  const Tensor ids = call.tensor("ids").of({kInt32}).shape({logits.size(0), "K"}).dense();
  kimi_topk_gate_given_params p = {};
  p.given = ids.data<int32_t>();
  p.top_k = int32_t(ids.size(1));
  p.score_function = call.choice<kimi_score_function>("score_function", kScoreFunctions);
  p.renormalize = call.truth();
  p.scaling_factor = float(call.number("scaling_factor"));
  set_logits(p, logits);
  call.check(gate::check_given("topk_gate_given", p, "ids.shape[1]"));
  if (const Tensor valid = call.optional("valid")) p.valid = valid_of(valid, logits);
  if (ids.is_cuda() && call.reads(ids))  // the CPU engine looks at every id by itself
    call.check(gate::check_ids("topk_gate_given", call.on_host(ids).data<int32_t>(), ids.count(),
                               p.num_experts));
  const Output weights = call.empty(kFloat32, {p.num_tokens, p.top_k});
  const Output indices = call.empty(kInt32, {p.num_tokens, p.top_k});
  const Output counts = call.empty(kInt32, {p.num_experts});
  p.weights = weights.data<float>();
  p.indices = indices.data<int32_t>();
  p.tokens_per_expert = counts.data<int32_t>();
  call.run(kimi_topk_gate_given, p);
  return call.result({weights, indices, counts});
}

PyObject* topk_gate_backward(Call& call) {
  const Tensor grad_weights = call.tensor("grad_weights"), unread = call.tensor("logits");
  const Tensor logits = unread.of(kNatives).shape({"T", "E"}).dense_rows();
  const Tensor indices = call.tensor("indices").of({kInt32}).shape({logits.size(0), "K"}).dense();
  kimi_topk_gate_backward_params p = {};
  p.grad_weights = grad_weights.of({kFloat32}).shape_like(indices).dense().data<float>();
  p.indices = indices.data<int32_t>();
  p.top_k = int32_t(indices.size(1));
  p.score_function = call.choice<kimi_score_function>("score_function", kScoreFunctions);
  p.renormalize = call.truth();
  p.scaling_factor = float(call.number("scaling_factor"));
  set_logits(p, logits);
  const Output grad = call.empty_like(logits);
  p.grad_logits = grad.data();
  call.run(kimi_topk_gate_backward, p);
  return call.result(grad);
}

}  // namespace

void define_topk_gate(Methods& methods) {
  methods.add<topk_gate, 11>("topk_gate");
  methods.add<topk_gate_given, 6>("topk_gate_given");
  methods.add<gate_plan, 11>("gate_plan");
  methods.add<topk_gate_backward, 6>("topk_gate_backward");
}

}  // namespace kimi::bindings
