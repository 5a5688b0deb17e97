// SPDX-License-Identifier: MIT
// muon_clip: the elementwise passes of the optimizer over lists of tensors.
//
//   muon_momentum  B <- B + (1 - mu) (g - B)      u = g + mu (B - g) with nesterov, else B
//   muon_update    p <- p (1 - decay)             p <- p - rate d;  a bf16 copy beside it
//   adamw          m <- m + (1 - b1) (g - m)      v <- v b2 + (1 - b2) g g
//                  p <- p (1 - lr wd)
//                  p <- p + (-lr / (1 - b1^t) m) / (sqrt(v) / sqrt(1 - b2^t) + eps)
//   squares        sum of x^2
//
// maximize: -g for g. cautious: the decay acts only where d p > 0 (m p > 0). Everything is fp32 in
// registers, whatever the dtypes, and rounded once where it is written. a + w (b - a) is
// fma(w, b - a, a) for w < 0.5, else fma(w - 1, b - a, b); p - rate d is fma(-rate, d, p);
// v is fma((1 - b2) g, g, v b2); the quotient is added by one addition.
//
// Sums of squares are fp64: blocks of 2^15 elements, in each 16 partial sums by element % 16, a
// tree of halves over them, blocks in ascending order.
//
// Cost an element (fp32): momentum 12 bytes read and written beside the update's 4, update 12,
// adamw 28. Blocks of all tensors are shared out as one list: threads show in no bit.
// Source: torch.optim.Muon, torch.optim.AdamW; cautious decay: arXiv 2411.16085.
#pragma once

#include <cstdint>

#include "common/status.h"
#include "cpu/engines.h"

namespace kimi {

using MuonMomentumParams = kimi_muon_momentum_params;
using MuonUpdateParams = kimi_muon_update_params;
using AdamwParams = kimi_adamw_params;
using SquaresParams = kimi_squares_params;

Status muon_momentum(const MuonMomentumParams& p, kimi_device device, void* stream);
Status muon_update(const MuonUpdateParams& p, kimi_device device, void* stream);
Status adamw(const AdamwParams& p, kimi_device device, void* stream);
Status squares(const SquaresParams& p, kimi_device device, void* stream);

namespace muon_clip_cpu {

// a + weight (b - a) as fma(factor, b - a, from_end ? b : a).
struct Lerp {
  float factor;
  bool from_end;

  explicit Lerp(double weight)
      : factor(weight < 0.5 ? float(weight) : float(weight) - 1.0f), from_end(weight >= 0.5) {}
};

struct Momentum {
  Lerp move, look_ahead;
  bool nesterov, maximize;
};
struct Decay {
  float keep;  // 1 - decay
  bool cautious;
};
struct Moments {
  Lerp first;
  float beta2, one_less_beta2, root_of_correction, eps, step;
  Decay decay;
  bool maximize;
};

// Passes over runs of n consecutive elements.
struct CpuEngine {
  void (*momentum)(const Momentum& m, const void* grad, kimi_dtype grad_dtype, void* buffer,
                   kimi_dtype buffer_dtype, float* update, int64_t n);
  // copy: bf16 or NULL
  void (*update)(const Decay& decay, float rate, void* param, kimi_dtype param_dtype,
                 const void* direction, kimi_dtype direction_dtype, void* copy, int64_t n);
  void (*adamw)(const Moments& m, void* param, kimi_dtype param_dtype, const void* grad,
                kimi_dtype grad_dtype, float* exp_avg, float* exp_avg_sq, int64_t n);
  double (*squares)(const void* x, kimi_dtype dtype, int64_t n);
};
KIMI_CPU_ENGINES(CpuEngine);

}  // namespace muon_clip_cpu
}  // namespace kimi
