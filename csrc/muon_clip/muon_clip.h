// SPDX-License-Identifier: MIT
// muon_clip: the elementwise passes of the optimizer over lists of tensors.
//
//   muon_momentum  B <- B + (1 - mu) (g - B)      u = g + mu (B - g) with nesterov, else B
//   muon_update    p <- p (1 - decay)             p <- p - rate d;  a bf16 copy beside it
//   adamw          m <- m + (1 - b1) (g - m)      v <- v b2 + (1 - b2) g g
//                  p <- p (1 - lr wd)
//                  p <- p + (-lr / (1 - b1^t) m) / (sqrt(v) / sqrt(1 - b2^t) + eps)
//   squares        sum of x^2
//   clip_factor    min(1, max_norm / (sqrt(sums of squares) + 1e-6))
//
// maximize: -g for g; scale: scale g for g, one product. cautious: the decay acts only where
// d p > 0 (m p > 0). Everything is fp32 in registers, whatever the dtypes, and rounded once where it
// is written. a + w (b - a) is fma(w, b - a, a) for w < 0.5, else fma(w - 1, b - a, b); p - rate d
// is fma(-rate, d, p); v is fma((1 - b2) g, g, v b2); sqrt(v) is multiplied by the inverse of
// sqrt(1 - b2^t); the quotient is added by one addition.
//
// Nothing waits for a gradient's flag: tensors with a sum of squares that is not finite are left
// alone by the passes themselves, and t counts what moved.
//
// Sums of squares are fp64: blocks of 2^13 elements, in each 512 partial sums by element % 512,
// added by halves within each run of 8 and then over the 64 runs; of the blocks 256 partial sums by
// block % 256, ascending, added by halves. Those of clip_factor: 32 by tensor % 32, likewise.
//
// Cost an element (fp32): momentum 12 bytes read and written beside the update's 4, update 12,
// adamw 28, squares 4. Blocks of all tensors are shared out as one list: threads show in no bit.
// adamw that measures looks for what is not finite in runs of tensors whose gradients stay in a
// cache until it updates them.
// Source: torch.optim.Muon, torch.optim.AdamW; cautious decay: arXiv 2411.16085.
#pragma once

#include <cstdint>

#include "common/status.h"
#include "cpu/engines.h"
#include "muon_clip/formulas.h"

namespace kimi {

using MuonMomentumParams = kimi_muon_momentum_params;
using MuonUpdateParams = kimi_muon_update_params;
using AdamwParams = kimi_adamw_params;
using SquaresParams = kimi_squares_params;
using ClipFactorParams = kimi_clip_factor_params;

Status muon_momentum(const MuonMomentumParams& p, kimi_device device, void* stream);
Status muon_update(const MuonUpdateParams& p, kimi_device device, void* stream);
size_t adamw_workspace_bytes(const AdamwParams& p, kimi_device device);
Status adamw(const AdamwParams& p, kimi_device device, void* stream);
size_t squares_workspace_bytes(const SquaresParams& p, kimi_device device);
Status squares(const SquaresParams& p, kimi_device device, void* stream);
size_t clip_factor_workspace_bytes(const ClipFactorParams& p, kimi_device device);
Status clip_factor(const ClipFactorParams& p, kimi_device device, void* stream);

// Arguments have been checked. muon_clip_cpu.cpp:
void muon_momentum_cpu(const MuonMomentumParams& p);
void muon_update_cpu(const MuonUpdateParams& p);
void adamw_cpu(const AdamwParams& p);
void squares_cpu(const SquaresParams& p);
void clip_factor_cpu(const ClipFactorParams& p);
// muon_clip.cu, squares.cu:
Status muon_momentum_cuda(const MuonMomentumParams& p, void* stream);
Status muon_update_cuda(const MuonUpdateParams& p, void* stream);
Status adamw_cuda(const AdamwParams& p, void* stream);
Status squares_cuda(const SquaresParams& p, void* stream);
Status clip_factor_cuda(const ClipFactorParams& p, void* stream);

namespace muon_clip_math {

// Orders of the sums.
constexpr int64_t kBlock = 1 << 13;  // elements
constexpr int kPartials = 512, kRun = 8, kBlockLanes = 256, kTensorLanes = 32;

}  // namespace muon_clip_math

namespace muon_clip_cpu {

using namespace muon_clip_math;

// Passes over runs of n consecutive elements.
struct CpuEngine {
  void (*momentum)(const Momentum& m, const void* grad, kimi_dtype grad_dtype, void* buffer,
                   kimi_dtype buffer_dtype, float* update, int64_t n);
  // copy: bf16 or NULL
  void (*update)(const Decay& decay, float rate, void* param, kimi_dtype param_dtype,
                 const void* direction, kimi_dtype direction_dtype, void* copy, int64_t n);
  // And whether next_n elements of another gradient, which comes later, are finite.
  bool (*adamw)(const Moments& m, void* param, kimi_dtype param_dtype, const void* grad,
                kimi_dtype grad_dtype, float* exp_avg, float* exp_avg_sq, int64_t n,
                const void* next, int64_t next_n);
  double (*squares)(const void* x, kimi_dtype dtype, int64_t n);  // n <= kBlock
  bool (*finite)(const void* x, kimi_dtype dtype, int64_t n);
};
KIMI_CPU_ENGINES(CpuEngine);

}  // namespace muon_clip_cpu
}  // namespace kimi
