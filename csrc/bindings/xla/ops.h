// SPDX-License-Identifier: MIT
// The ops that XLA can call (frame.h), and what several of them take in the same way. Arguments are
// those of python/kimi_ops/jax in order, then its attributes.
#pragma once

#include "bindings/xla/frame.h"
#include "kimi_ops.h"

namespace kimi::xla {

constexpr Types kFloats = {kF32, kBF16, kF16};
constexpr std::initializer_list<const char*> kScoreFunctions = {"sigmoid", "softmax",
                                                                "sqrtsoftplus"};

// Router logits [T, E].
template <class Params>
void set_logits(Frame& f, Params& p) {
  const Tensor& logits = f.next("logits", kFloats, {kAny, kAny});
  p.logits = logits.data;
  p.num_tokens = logits.size(0);
  p.num_experts = int32_t(logits.size(1));
  p.logits_stride = logits.size(1);
  p.logits_dtype = native(logits.dtype);
}

// Their gradient, of their dtype, where they come behind the gradient that it is made of.
template <class Params>
void set_grad_logits(Frame& f, Params& p) {
  p.grad_logits = f.out({f.arguments[1].dtype}, {p.num_tokens, p.num_experts}).data;
}

template <class Params>
void set_score(Frame& f, Params& p) {
  p.score_function = kimi_score_function(f.choice("score_function", kScoreFunctions));
}

// Weights [E, rows, columns] of a dtype, or quantised ones.
struct Stack {
  kimi_expert_weights weights;
  int64_t experts, rows, columns;
};
// The next argument, and its scale behind it, which others than quantised ones have none of. FP8 and
// INT4 weights have given columns.
Stack stack_of(Frame& f, const std::string& name, DataType dtype, int64_t experts, int64_t rows,
               int64_t columns);

// gate.cpp
Status topk_gate(Frame& f);
Status topk_gate_given(Frame& f);
Status topk_gate_backward(Frame& f);
Status gate_plan(Frame& f);

// balance.cpp
Status update_expert_bias(Frame& f);
Status sequence_counts(Frame& f);
Status sequence_balance_loss(Frame& f);
Status sequence_balance_loss_backward(Frame& f);
Status quantile_histogram(Frame& f);
Status z_loss(Frame& f);
Status z_loss_backward(Frame& f);

// permute.cpp
Status permute_plan(Frame& f);
Status permute(Frame& f);
Status unpermute(Frame& f);
Status unpermute_backward(Frame& f);
Status sort_chunks(Frame& f);

// products.cpp
Status grouped_gemm(Frame& f);
Status grouped_gemm_wgrad(Frame& f);
Status grouped_gemm_fp8(Frame& f);
Status matrix_product(Frame& f);
Status newton_schulz(Frame& f);
Status attention_max_logits(Frame& f);

// experts.cpp
Status fused_experts(Frame& f);
Status fused_experts_backward(Frame& f);

// passes.cpp
Status clip_rows(Frame& f);
Status muon_momentum(Frame& f);
Status muon_update(Frame& f);
Status adamw(Frame& f);
Status squares(Frame& f);
Status clip_factor(Frame& f);

}  // namespace kimi::xla
