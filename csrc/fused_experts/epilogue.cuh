// SPDX-License-Identifier: MIT
// What becomes of the sums of fused_experts' products (gemm/epilogue.cuh): the activation, and its
// gradient.
#pragma once

#include "common/dtype.h"
#include "device/ops.cuh"
#include "device/vec.cuh"
#include "device/warp.cuh"
#include "fused_experts/activate_product.h"
#include "fused_experts/activation.h"
#include "gemm/epilogue.cuh"

namespace kimi::experts {

// Without the slow path of a division, which is a call: within 2 ulp while the divisor is normal
// and below 2^100; beyond that every quotient here is 0 as far as its sum is concerned.
struct ActivationOps : CudaOps {
  static KIMI_HOST_DEVICE float div(float a, float b) {
    const float d = b > 0x1p100f ? 0x1p100f : b;
    float r = reciprocal_estimate(d);
    r = fma_rn(r, fma_rn(-d, r, 1.0f), r);
    return mul_rn(a, r);
  }
};

// visit<kActivation>() for the runtime activation.
template <class Visitor>
__device__ void with_activation(kimi_activation activation, const Visitor& visit) {
  switch (activation) {
    case KIMI_ACTIVATION_GELU:
      return visit.template operator()<KIMI_ACTIVATION_GELU>();
    case KIMI_ACTIVATION_SITU:
      return visit.template operator()<KIMI_ACTIVATION_SITU>();
    case KIMI_ACTIVATION_GELU_TANH:
      return visit.template operator()<KIMI_ACTIVATION_GELU_TANH>();
    case KIMI_ACTIVATION_RELU2:
      return visit.template operator()<KIMI_ACTIVATION_RELU2>();
    case KIMI_ACTIVATION_SWIGLU:
      return visit.template operator()<KIMI_ACTIVATION_SWIGLU>();
    default:
      return visit.template operator()<KIMI_ACTIVATION_SILU>();
  }
}

// [g; u] = C + bias, two columns F apart: h = a(g, u), times its weight where weights come first.
template <class T>
struct Activate {
  using Params = ActivateParams;
  static constexpr bool kGated = true, kWritesZeros = false;
  static constexpr int kRun = 8;

  __device__ static void write(const Params& a, const gemm::Product& p, const gemm::Place& at,
                               float (&g)[8], float (&u)[8], int count) {
    if (count == 0) return;
    if (a.bias != nullptr) {
      const T* bias = static_cast<const T*>(a.bias) + at.group * 2 * p.cols + at.col;
      add(bias, g, count, a.wide);
      add(bias + p.cols, u, count, a.wide);
    }
    if (a.gate_up != nullptr) {
      T* saved = static_cast<T*>(a.gate_up) + at.row * 2 * p.cols + at.col;
      store8(saved, g, count, a.wide);
      store8(saved + p.cols, u, count, a.wide);
    }
    if (a.hidden == nullptr) return;
    float h[8];
    with_activation(a.activation.kind, [&]<kimi_activation kActivation>() {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        h[i] = gated<ActivationOps, kActivation, false>(g[i], u[i], a.activation).value;
    });
    if (a.weights != nullptr) {
      const float weight = a.weights[a.source[at.row]];
#pragma unroll
      for (int i = 0; i < 8; ++i) h[i] = mul_rn(weight, h[i]);
    }
    store8(static_cast<T*>(a.hidden) + at.row * p.cols + at.col, h, count, a.wide);
  }

 private:
  __device__ static void add(const T* bias, float (&sums)[8], int count, bool wide) {
    float of_columns[8];
    load8(bias, of_columns, count, wide);
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i] = add_rn(sums[i], of_columns[i]);
  }
};

// C = dh before its weight: d[g; u], weight times h, partial <C, h>.
template <class T>
struct ActivateBackward {
  using Params = ActivateParams;
  static constexpr bool kGated = false, kWritesZeros = false;
  static constexpr int kRun = kPartial;

  // Four lanes beside each other hold the 32 columns of a partial sum.
  __device__ static void write(const Params& a, const gemm::Product& p, const gemm::Place& at,
                               float (&c)[8], int count) {
    float g[8], u[8], h[8], dot = 0.0f, weight = 0.0f;
    if (count > 0) {
      const T* saved = static_cast<const T*>(a.gate_up) + at.row * 2 * p.cols + at.col;
      load8(saved, g, count, a.wide);
      load8(saved + p.cols, u, count, a.wide);
      weight = a.weights[a.source[at.row]];
      with_activation(a.activation.kind, [&]<kimi_activation kActivation>() {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const auto y = gated<ActivationOps, kActivation, true>(g[i], u[i], a.activation);
          if (i < count) dot = fma_rn(c[i], y.value, dot);
          h[i] = mul_rn(weight, y.value);
          const float dh = mul_rn(weight, c[i]);
          g[i] = mul_rn(dh, y.slope_gate);
          u[i] = mul_rn(dh, y.slope_up);
        }
      });
      T* grad = static_cast<T*>(a.grad_gate_up) + at.row * 2 * p.cols + at.col;
      store8(grad, g, count, a.wide);
      store8(grad + p.cols, u, count, a.wide);
      store8(static_cast<T*>(a.hidden) + at.row * p.cols + at.col, h, count, a.wide);
    }
    dot += warp_exchange(dot, 1);
    dot += warp_exchange(dot, 2);
    if (count > 0 && lane_id() % 4 == 0) {
      const int64_t stride = (p.cols + kPartial - 1) / kPartial;
      a.partial[at.row * stride + at.col / kPartial] = dot;
    }
  }
};

}  // namespace kimi::experts
