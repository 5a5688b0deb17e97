// SPDX-License-Identifier: MIT
// The portable engine: the passes of fused_experts.h, one element after another.
#include "cpu/vec_portable.h"
#include "fused_experts/fused_experts_simd.h"

namespace kimi::experts {
namespace {

using cpu::Portable;

// Of partial sums in columns, product and addition rounded one by one.
void activate_backward_of_columns(const ActivateBackwardArguments& s) {
  dispatch_activation(s.dtype, s.activation.kind, [&]<class T, kimi_activation kActivation>() {
    const int64_t partials = ceil_div(s.width, kPartial);
    for (int64_t i = 0; i < s.rows; ++i) {
      const float weight = s.weights[s.source[i]];
      float sum = 0.0f;
      for (int64_t j = 0; j < s.cols; ++j) {
        const T* gate_up = static_cast<const T*>(s.gate_up) + i * 2 * s.width + j;
        T* grad = static_cast<T*>(s.grad_gate_up) + i * 2 * s.width + j;
        const float dh = s.c[i * s.stride + j];
        const auto h = gated<Portable, kActivation, true>(to_float(gate_up[0]),
                                                          to_float(gate_up[s.width]), s.activation);
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

}  // namespace

extern const CpuEngine kPortableEngine = {activate<Portable>, activate_backward_of_columns,
                                          combine<Portable>};

}  // namespace kimi::experts
