// SPDX-License-Identifier: MIT
// fused_experts: the routed experts of one layer, forward and backward.
//
//   rows     row r of expert e stands for pair (t, k): source[r] = t*K + k, row_map[t,k] = r, in
//            the order of permute_plan with align 1; offsets[e] is one past the last row of e
//   forward  [g; u] = w_gate_up[e] x[t] + b_gate_up[e]     h = a(g, u)
//            y[t] = sum_k weights[t,k] (w_down[e] h + b_down[e])
//   backward c = w_down[e]^T dy[t]          dweights[t,k] = <c, h> + <b_down[e], dy[t]>
//            [dg; du] = weights[t,k] c a'(g, u)
//            dx[t] = sum_k w_gate_up[e]^T [dg; du]
//            dw_gate_up[e] = sum_r [dg; du] x[t]^T           db_gate_up[e] = sum_r [dg; du]
//            dw_down[e] = sum_r dy[t] (weights[t,k] h)^T     db_down[e] = sum_r weights[t,k] dy[t]
//
// The activations a are those of kimi_activation; Phi of gelu by erfc to 1.2e-7. Weights that come
// first multiply h, not the outputs: the backward is the same.
//
// x [T, H] is gathered while it is packed and [g; u] goes through the activation while it is in the
// cache: neither gathered rows nor a second activation exist in memory. The weighted sum runs over
// slots in ascending order in fp32, columns by columns, from a buffer of kSumBytes (128 columns of
// all rows where that is more).
//
//   x --gather--> [ gate | up ] --act--> h [R, F] --> w_down h, some columns [R, C] --sum--> y
//
// Cost: 6 T K F H operations forward, 12 more backward (14 with [g; u] computed again); each used
// expert's matrices are read once (twice backward). Source: Kimi K2, DeepSeek-V3 (arXiv
// 2412.19437); the gradient of the weights from <c, h> as in SonicMoE (arXiv 2512.14080).
#pragma once

#include <cstdint>

#include "common/status.h"
#include "cpu/engines.h"

namespace kimi {

using FusedExpertsParams = kimi_fused_experts_params;
using FusedExpertsBackwardParams = kimi_fused_experts_backward_params;

size_t fused_experts_workspace_bytes(const FusedExpertsParams& p, kimi_device device);
Status fused_experts(const FusedExpertsParams& p, kimi_device device, void* stream);
size_t fused_experts_backward_workspace_bytes(const FusedExpertsBackwardParams& p,
                                              kimi_device device);
Status fused_experts_backward(const FusedExpertsBackwardParams& p, kimi_device device,
                              void* stream);

// fused_experts.cu. Arguments have been checked, the plan has not.
size_t fused_experts_workspace_bytes_cuda(const FusedExpertsParams& p);
Status fused_experts_cuda(const FusedExpertsParams& p, void* stream);
size_t fused_experts_backward_workspace_bytes_cuda(const FusedExpertsBackwardParams& p);
Status fused_experts_backward_cuda(const FusedExpertsBackwardParams& p, void* stream);

namespace experts {

// An activation with what kernels need of its numbers.
struct Activation {
  kimi_activation kind;
  kimi_activation_numbers numbers;
  float gate_factor, up_factor;  // situ: 1 / bound, 0 for none

  template <class Params>
  static Activation of(const Params& p) {
    const bool situ = p.activation == KIMI_ACTIVATION_SITU;
    return {p.activation, p.numbers, situ ? 1.0f / p.numbers.gate_bound : 0.0f,
            situ ? 1.0f / p.numbers.up_bound : 0.0f};
  }
};

constexpr int64_t kPartial = 32;  // columns of one partial sum of <c, h>

// Sums [g; u] of `rows` rows and `cols` columns, g at c, u at c + part_stride.
struct ActivateArguments {
  const float* c;
  int64_t stride, part_stride, rows, cols;
  Activation activation;
  kimi_dtype dtype;
  void* gate_up;          // out [rows, 2F] dtype or nullptr: g here, u `width` elements further
  void* hidden;           // out [rows, F] dtype or nullptr
  int64_t width;          // F
  const void* bias;       // dtype or nullptr: that of g, that of u `width` elements further
  const int32_t* source;  // [rows]
  const float* weights;   // by source: h is multiplied by them; or nullptr
};
// Sums c of `rows` rows and `cols` columns, with the [g; u] that belong to them.
struct ActivateBackwardArguments {
  const float* c;
  int64_t stride, rows, cols;
  Activation activation;
  kimi_dtype dtype;
  const void* gate_up;    // [rows, 2F] dtype
  const int32_t* source;  // [rows]
  const float* weights;   // by source
  void* grad_gate_up;     // out [rows, 2F] dtype
  void* hidden;           // out [rows, F] dtype: weight times h
  float* partial;         // out [rows, ceil(F / kPartial)]: <c, h> by runs of kPartial columns
  int64_t width;
};
// x[t, col + i] = sum_k weights[t, k] rows[row_map[t, k], i]
struct CombineArguments {
  const float* rows;  // [R, cols]
  const int32_t* row_map;
  const float* weights;  // [T, K] or nullptr for 1
  void* x;               // out [T, H] dtype
  kimi_dtype dtype;
  int64_t hidden, col, cols;
  int32_t top_k;
};
struct CpuEngine {
  void (*activate)(const ActivateArguments& arguments);
  void (*activate_backward)(const ActivateBackwardArguments& arguments);
  void (*combine)(const CombineArguments& arguments, int64_t begin, int64_t end);  // tokens
};
KIMI_CPU_ENGINES(CpuEngine);

}  // namespace experts
}  // namespace kimi
