// SPDX-License-Identifier: MIT
#include "balance/check.h"
#include "bindings/ops.h"

namespace kimi::bindings {
namespace {

PyObject* update_expert_bias(Call& call) {
  const Tensor bias = call.tensor("bias").of({kFloat32}).shape({"E"}).writable({});
  const Tensor counts = call.tensor("tokens_per_expert");
  const Tensor dense = bias.dense();
  kimi_update_expert_bias_params p = {};
  p.bias = dense.data<float>();
  p.tokens_per_expert =
      counts.of({kInt32, kInt64}).shape({bias.size(0)}).beside(bias).dense().data();
  p.num_experts = bias.size(0);
  p.rate = float(call.number("rate"));
  p.counts_are_int64 = counts.dtype == kInt64;
  p.centered = call.truth();
  call.run(kimi_update_expert_bias, p);
  call.write_back(bias, dense);
  return call.none();
}

PyObject* sequence_balance_loss(Call& call) {
  const Tensor logits = call.tensor("logits").of(kNatives).shape({"T", "E"}).dense_rows();
  const Tensor indices = call.tensor("indices");
  kimi_sequence_balance_loss_params p = {};
  p.indices =
      indices.of({kInt32}).shape({logits.size(0), "K"}).beside(logits).dense().data<int32_t>();
  p.top_k = int32_t(indices.size(1));
  p.num_sequences = call.integer("num_sequences");
  p.score_function = call.choice<kimi_score_function>("score_function", kScoreFunctions);
  p.coefficient = float(call.number("coefficient"));
  set_logits(p, logits);
  call.check(balance::check_sequences("sequence_balance_loss", p));
  const Output loss = call.empty(kFloat32, {});
  const Output counts = call.empty(kInt32, {p.num_sequences, p.num_experts});
  p.loss = loss.data<float>();
  p.tokens_per_expert = counts.data<int32_t>();
  call.workspace(p, kimi_sequence_balance_loss_workspace_bytes);
  call.run(kimi_sequence_balance_loss, p);
  return call.result({loss, counts});
}

PyObject* sequence_balance_loss_backward(Call& call) {
  const Tensor grad_loss = call.tensor("grad_loss").of({kFloat32}).shape({});
  const Tensor logits = call.tensor("logits").of(kNatives).shape({"T", "E"}).dense_rows();
  logits.beside(grad_loss);
  const Tensor counts = call.tensor("tokens_per_expert").of({kInt32}).shape({"N", logits.size(1)});
  kimi_sequence_balance_loss_backward_params p = {};
  p.grad_loss = grad_loss.data<float>();
  p.tokens_per_expert = counts.beside(logits).dense().data<int32_t>();
  p.num_sequences = counts.size(0);
  p.top_k = call.int32("top_k");
  p.score_function = call.choice<kimi_score_function>("score_function", kScoreFunctions);
  p.coefficient = float(call.number("coefficient"));
  set_logits(p, logits);
  const Output grad = call.empty_like(logits);
  p.grad_logits = grad.data();
  call.run(kimi_sequence_balance_loss_backward, p);
  return call.result(grad);
}

PyObject* z_loss(Call& call) {
  const Tensor logits = call.tensor("logits").of(kNatives).shape({"T", "E"}).dense_rows();
  kimi_z_loss_params p = {};
  p.coefficient = float(call.number("coefficient"));
  const Tensor valid = call.optional("valid");
  set_logits(p, logits);
  call.check(balance::check_rows("z_loss", p));
  if (valid) p.valid = valid_of(valid, logits);
  const Output loss = call.empty(kFloat32, {});
  const Output log_sum_exp = call.empty(kFloat32, {p.num_tokens});
  const Output valid_tokens = call.empty(kInt32, {1});
  p.loss = loss.data<float>();
  p.log_sum_exp = log_sum_exp.data<float>();
  p.valid_tokens = valid_tokens.data<int32_t>();
  call.workspace(p, kimi_z_loss_workspace_bytes);
  call.run(kimi_z_loss, p);
  return call.result({loss, log_sum_exp, valid_tokens});
}

PyObject* z_loss_backward(Call& call) {
  const Tensor grad_loss = call.tensor("grad_loss").of({kFloat32}).shape({});
  const Tensor logits = call.tensor("logits").of(kNatives).shape({"T", "E"}).dense_rows();
  logits.beside(grad_loss);
  const Tensor log_sum_exp = call.tensor("log_sum_exp").of({kFloat32}).shape({logits.size(0)});
  const Tensor valid_tokens = call.tensor("valid_tokens").of({kInt32}).shape({1});
  kimi_z_loss_backward_params p = {};
  p.grad_loss = grad_loss.data<float>();
  p.log_sum_exp = log_sum_exp.beside(logits).dense().data<float>();
  p.valid_tokens = valid_tokens.beside(logits).data<int32_t>();
  p.coefficient = float(call.number("coefficient"));
  set_logits(p, logits);
  const Output grad = call.empty_like(logits);
  p.grad_logits = grad.data();
  call.run(kimi_z_loss_backward, p);
  return call.result(grad);
}

}  // namespace

void define_balance(Methods& methods) {
  methods.add<update_expert_bias, 4>("update_expert_bias_");
  methods.add<sequence_balance_loss, 5>("sequence_balance_loss");
  methods.add<sequence_balance_loss_backward, 6>("sequence_balance_loss_backward");
  methods.add<z_loss, 3>("z_loss");
  methods.add<z_loss_backward, 5>("z_loss_backward");
}

}  // namespace kimi::bindings
