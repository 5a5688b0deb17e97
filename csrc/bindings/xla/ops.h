// SPDX-License-Identifier: MIT
// The ops that XLA can call (frame.h).
#pragma once

#include "bindings/xla/frame.h"
#include "kimi_ops.h"

namespace kimi::xla {

constexpr std::initializer_list<DataType> kFloats = {kF32, kBF16, kF16};

// routing.cpp
Status topk_gate(Frame& f);
Status topk_gate_backward(Frame& f);
Status update_expert_bias(Frame& f);
Status sequence_balance_loss(Frame& f);
Status sequence_balance_loss_backward(Frame& f);
Status z_loss(Frame& f);
Status z_loss_backward(Frame& f);
Status permute_plan(Frame& f);
Status permute(Frame& f);
Status unpermute(Frame& f);
Status unpermute_backward(Frame& f);
Status sort_chunks(Frame& f);

// products.cpp
Status grouped_gemm(Frame& f);
Status grouped_gemm_wgrad(Frame& f);
Status fused_experts(Frame& f);
Status fused_experts_backward(Frame& f);
Status newton_schulz(Frame& f);
Status attention_max_logits(Frame& f);

}  // namespace kimi::xla
