// SPDX-License-Identifier: MIT
#include "balance/check.h"
#include "bindings/ops.h"
#include "grouped_gemm/check.h"

namespace kimi::bindings {
namespace {

PyObject* update_expert_bias(Call& call) {
  const Tensor bias = call.tensor("bias").of({kFloat32}).shape({"E"}).writable({});
  const Tensor counts = call.tensor("tokens_per_expert");
  const Tensor dense = bias.dense();
  kimi_update_expert_bias_params p = {};
  p.bias = dense.data<float>();
  p.tokens_per_expert = counts.of({kInt32, kInt64}).shape({bias.size(0)}).dense().data();
  p.num_experts = bias.size(0);
  p.rate = float(call.number("rate"));
  p.counts_are_int64 = counts.dtype == kInt64;
  p.centered = call.truth();
  call.run(kimi_update_expert_bias, p);
  call.write_back(bias, dense);
  return call.none();
}

// Where sequences end, and which tokens count: after `num_sequences`.
template <class Params>
void set_sequences(Params& p, const Tensor& offsets, const Tensor& valid, const Tensor& rows) {
  Call& call = *rows.call;
  if (offsets) {
    p.offsets = offsets.of({kInt32}).shape({p.num_sequences}).dense().template data<int32_t>();
    if (call.reads(offsets))
      call.check(check_offsets(std::string(call.op).c_str(),
                               call.on_host(offsets.dense()).template data<int32_t>(),
                               p.num_sequences, p.num_tokens));
  }
  if (valid) p.valid = valid_of(valid, rows);
}

PyObject* sequence_counts(Call& call) {
  const Tensor indices = call.tensor("indices").of({kInt32}).shape({"T", "K"}).dense();
  kimi_sequence_counts_params p = {};
  p.indices = indices.data<int32_t>();
  p.num_tokens = indices.size(0);
  p.top_k = int32_t(indices.size(1));
  p.num_experts = call.int32("num_experts");
  p.num_sequences = call.integer("num_sequences");
  const Tensor offsets = call.optional("offsets"), valid = call.optional("valid");
  set_sequences(p, offsets, valid, indices);
  call.check(balance::check_counts("sequence_counts", p));
  const Output counts = call.empty(kInt32, {p.num_sequences, p.num_experts});
  const Output tokens = call.empty(kInt32, {p.num_sequences});
  p.tokens_per_expert = counts.data<int32_t>();
  p.sequence_tokens = tokens.data<int32_t>();
  call.run(kimi_sequence_counts, p);
  return call.result({counts, tokens});
}

// What the loss and its gradient take alike, from `logits` on.
template <class Params>
Tensor set_loss(Params& p, Call& call) {
  const Tensor logits = call.tensor("logits").of(kNatives).shape({"T", "E"}, kFlatten).dense_rows();
  const Tensor counts = call.tensor("tokens_per_expert").of({kInt32}).shape({"N", logits.size(1)});
  const Tensor tokens = call.tensor("sequence_tokens").of({kInt32}).shape({counts.size(0)});
  const Tensor offsets = call.optional("offsets"), valid = call.optional("valid");
  set_logits(p, logits);
  p.tokens_per_expert = counts.dense().template data<int32_t>();
  p.sequence_tokens = tokens.dense().template data<int32_t>();
  p.num_sequences = counts.size(0);
  set_sequences(p, offsets, valid, logits);
  p.top_k = call.int32("top_k");
  p.score_function = call.choice<kimi_score_function>("score_function", kScoreFunctions);
  p.coefficient = float(call.number("coefficient"));
  call.check(balance::check_loss(std::string(call.op).c_str(), p));
  return logits;
}

PyObject* sequence_balance_loss(Call& call) {
  kimi_sequence_balance_loss_params p = {};
  set_loss(p, call);
  const Output loss = call.empty(kFloat32, {});
  p.loss = loss.data<float>();
  call.workspace(p, kimi_sequence_balance_loss_workspace_bytes);
  call.run(kimi_sequence_balance_loss, p);
  return call.result(loss);
}

PyObject* sequence_balance_loss_backward(Call& call) {
  const Tensor grad_loss = call.tensor("grad_loss").of({kFloat32}).shape({});
  kimi_sequence_balance_loss_backward_params p = {};
  p.grad_loss = grad_loss.data<float>();
  const Tensor logits = set_loss(p, call);
  const Output grad = call.empty_like(logits);
  p.grad_logits = grad.data();
  call.run(kimi_sequence_balance_loss_backward, p);
  return call.result(grad);
}

PyObject* quantile_histogram(Call& call) {
  const Tensor histogram = call.tensor("histogram").of({kInt32}).shape({"E", "bins"}).writable({});
  const Tensor dense = histogram.dense();
  const Tensor logits =
      call.tensor("logits").of(kNatives).shape({"T", histogram.size(0)}, kFlatten).dense_rows();
  const Tensor cutoffs = call.tensor("cutoffs").of({kFloat32}).shape({logits.size(0)}).dense();
  const Tensor bounds = call.tensor("bounds").of({kFloat32}).shape({2}).dense();
  kimi_quantile_histogram_params p = {};
  set_logits(p, logits);
  p.cutoffs = cutoffs.data<float>();
  p.bounds = bounds.data<float>();
  p.score_function = call.choice<kimi_score_function>("score_function", kScoreFunctions);
  if (const Tensor valid = call.optional("valid")) p.valid = valid_of(valid, logits);
  p.num_bins = int32_t(std::min<int64_t>(histogram.size(1), INT32_MAX));
  call.check(balance::check_bins(std::string(call.op).c_str(), p));
  if (call.reads(bounds))
    call.check(
        balance::check_bounds(std::string(call.op).c_str(), call.on_host(bounds).data<float>()));
  p.histogram = dense.data<int32_t>();
  call.run(kimi_quantile_histogram, p);
  call.write_back(histogram, dense);
  return call.none();
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
  const Tensor log_sum_exp = call.tensor("log_sum_exp").of({kFloat32}).shape({logits.size(0)});
  const Tensor valid_tokens = call.tensor("valid_tokens").of({kInt32}).shape({1});
  kimi_z_loss_backward_params p = {};
  p.grad_loss = grad_loss.data<float>();
  p.log_sum_exp = log_sum_exp.dense().data<float>();
  p.valid_tokens = valid_tokens.data<int32_t>();
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
  methods.add<sequence_counts, 5>("sequence_counts");
  methods.add<sequence_balance_loss, 8>("sequence_balance_loss");
  methods.add<sequence_balance_loss_backward, 9>("sequence_balance_loss_backward");
  methods.add<quantile_histogram, 6>("quantile_histogram_");
  methods.add<z_loss, 3>("z_loss");
  methods.add<z_loss_backward, 5>("z_loss_backward");
}

}  // namespace kimi::bindings
