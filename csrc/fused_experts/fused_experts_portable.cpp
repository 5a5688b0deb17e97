// SPDX-License-Identifier: MIT
// The portable engine: the passes of fused_experts.h, one element after another.
#include "cpu/vec_portable.h"
#include "fused_experts/activation.h"

namespace kimi::experts {
namespace {

using cpu::Portable;

void activate(const ActivateArguments& s) {
  dispatch_activation(s.dtype, s.activation, [&]<class T, kimi_activation kActivation>() {
    for (int64_t i = 0; i < s.rows; ++i)
      for (int64_t j = 0; j < s.cols; ++j) {
        const float g = s.c[i * s.stride + j], u = s.c[i * s.stride + s.part_stride + j];
        if (s.gate_up) {
          T* saved = static_cast<T*>(s.gate_up) + i * 2 * s.width + j;
          saved[0] = from_float<T>(g);
          saved[s.width] = from_float<T>(u);
        }
        if (s.hidden)
          static_cast<T*>(s.hidden)[i * s.width + j] =
              from_float<T>(gated<Portable, kActivation, false>(g, u).value);
      }
  });
}

void activate_backward(const ActivateBackwardArguments& s) {
  dispatch_activation(s.dtype, s.activation, [&]<class T, kimi_activation kActivation>() {
    const int64_t partials = (s.width + kPartial - 1) / kPartial;
    for (int64_t i = 0; i < s.rows; ++i) {
      const float weight = s.weights[s.source[i]];
      float sum = 0.0f;
      for (int64_t j = 0; j < s.cols; ++j) {
        const T* gate_up = static_cast<const T*>(s.gate_up) + i * 2 * s.width + j;
        T* grad = static_cast<T*>(s.grad_gate_up) + i * 2 * s.width + j;
        const float dh = s.c[i * s.stride + j];
        const auto h =
            gated<Portable, kActivation, true>(to_float(gate_up[0]), to_float(gate_up[s.width]));
        sum += dh * h.value;
        grad[0] = from_float<T>(dh * weight * h.slope_gate);
        grad[s.width] = from_float<T>(dh * weight * h.slope_up);
        static_cast<T*>(s.hidden)[i * s.width + j] = from_float<T>(weight * h.value);
        if ((j + 1) % kPartial == 0 || j + 1 == s.cols) {
          s.partial[i * partials + j / kPartial] = sum;
          sum = 0.0f;
        }
      }
    }
  });
}

void combine(const CombineArguments& s, int64_t begin, int64_t end) {
  dispatch(s.dtype, [&]<class T>() {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t j = 0; j < s.cols; ++j) {
        float sum = 0.0f;
        for (int32_t k = 0; k < s.top_k; ++k) {
          const int64_t row = s.row_map[t * s.top_k + k];
          if (row < 0) continue;
          const float weight = s.weights ? s.weights[t * s.top_k + k] : 1.0f;
          sum = std::fma(weight, s.rows[row * s.cols + j], sum);
        }
        static_cast<T*>(s.x)[t * s.hidden + s.col + j] = from_float<T>(sum);
      }
  });
}

}  // namespace

const CpuEngine kPortableEngine = {activate, activate_backward, combine};

}  // namespace kimi::experts
