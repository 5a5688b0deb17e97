// SPDX-License-Identifier: MIT
// The passes between the products for SIMD engines, a template over `O`, the vectors of
// cpu/vec_*.h. Included by the engine files only.
#pragma once

#include "common/integer.h"
#include "fused_experts/activation.h"

namespace kimi::experts {
namespace {  // every ISA file has its own copy

// Lanes of vector v that are left.
template <class O>
int lanes(int64_t left, int v) {
  const int64_t n = left - v * O::kLanes;
  return n < O::kLanes ? int(n) : O::kLanes;
}

template <class O>
void activate(const ActivateArguments& s) {
  dispatch_activation(s.dtype, s.activation.kind, [&]<class T, kimi_activation kActivation>() {
    const T* bias = static_cast<const T*>(s.bias);
    for (int64_t i = 0; i < s.rows; ++i) {
      const float* gate = s.c + i * s.stride;
      const float* up = gate + s.part_stride;
      T* saved = s.gate_up ? static_cast<T*>(s.gate_up) + i * 2 * s.width : nullptr;
      T* hidden = s.hidden ? static_cast<T*>(s.hidden) + i * s.width : nullptr;
      const auto weight = O::set(s.weights ? s.weights[s.source[i]] : 1.0f);
      for (int64_t j = 0; j < s.cols; j += O::kLanes) {
        const int left = s.cols - j < O::kLanes ? int(s.cols - j) : O::kLanes;
        auto g = O::load(gate + j, left), u = O::load(up + j, left);
        if (bias) {
          g = O::add(g, O::load(bias + j, left));
          u = O::add(u, O::load(bias + s.width + j, left));
        }
        if (saved) {
          O::store(saved + j, g, left);
          O::store(saved + s.width + j, u, left);
        }
        if (!hidden) continue;
        auto h = gated<O, kActivation, false>(g, u, s.activation).value;
        if (s.weights) h = O::mul(weight, h);
        O::store(hidden + j, h, left);
      }
    }
  });
}

template <class O>
void activate_backward(const ActivateBackwardArguments& s) {
  dispatch_activation(s.dtype, s.activation.kind, [&]<class T, kimi_activation kActivation>() {
    using F = typename O::F;
    const int64_t partials = ceil_div(s.width, kPartial);
    for (int64_t i = 0; i < s.rows; ++i) {
      const float* c = s.c + i * s.stride;
      const T* gate_up = static_cast<const T*>(s.gate_up) + i * 2 * s.width;
      T* grad = static_cast<T*>(s.grad_gate_up) + i * 2 * s.width;
      T* hidden = static_cast<T*>(s.hidden) + i * s.width;
      const F weight = O::set(s.weights[s.source[i]]);
      for (int64_t run = 0; run < s.cols; run += kPartial) {
        F sum = O::set(0.0f);
        for (int64_t j = run; j < run + kPartial && j < s.cols; j += O::kLanes) {
          const int left = s.cols - j < O::kLanes ? int(s.cols - j) : O::kLanes;
          const F g = O::load(gate_up + j, left), u = O::load(gate_up + s.width + j, left);
          const F dh = O::load(c + j, left), scaled = O::mul(dh, weight);
          const auto h = gated<O, kActivation, true>(g, u, s.activation);
          // Lanes past the end are zeros: g = u = 0 gives h = 0.
          sum = O::fma(dh, h.value, sum);
          O::store(grad + j, O::mul(scaled, h.slope_gate), left);
          O::store(grad + s.width + j, O::mul(scaled, h.slope_up), left);
          O::store(hidden + j, O::mul(weight, h.value), left);
        }
        s.partial[i * partials + run / kPartial] = O::sum_lanes(sum);
      }
    }
  });
}

template <class O>
void combine(const CombineArguments& s, int64_t begin, int64_t end) {
  dispatch(s.dtype, [&]<class T>() {
    using F = typename O::F;
    constexpr int kVectors = 4, kStep = kVectors * O::kLanes;
    for (int64_t t = begin; t < end; ++t) {
      const int32_t* row = s.row_map + t * s.top_k;
      const float* weights = s.weights ? s.weights + t * s.top_k : nullptr;
      T* x = static_cast<T*>(s.x) + t * s.hidden + s.col;
      for (int64_t j = 0; j < s.cols; j += kStep) {
        const int64_t left = s.cols - j;
        F sum[kVectors];
        for (int v = 0; v < kVectors; ++v) sum[v] = O::set(0.0f);
        for (int32_t k = 0; k < s.top_k; ++k) {
          if (row[k] < 0) continue;
          const float* from = s.rows + row[k] * s.cols + j;
          const F w = O::set(weights ? weights[k] : 1.0f);
          for (int v = 0; v < kVectors && v * O::kLanes < left; ++v)
            sum[v] = O::fma(w, O::load(from + v * O::kLanes, lanes<O>(left, v)), sum[v]);
        }
        for (int v = 0; v < kVectors && v * O::kLanes < left; ++v)
          O::store(x + j + v * O::kLanes, sum[v], lanes<O>(left, v));
      }
    }
  });
}

template <class O>
constexpr CpuEngine kEngine = {activate<O>, activate_backward<O>, combine<O>};

}  // namespace
}  // namespace kimi::experts
