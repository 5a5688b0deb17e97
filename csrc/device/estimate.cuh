// SPDX-License-Identifier: MIT
//
// 2^x as the hardware estimates it, beside the estimate of 1 / x (math.cuh), for decisions that leave
// room for the error of both.
#pragma once

#include <cmath>

#include "device/ops.cuh"

namespace kimi {

/// ex2.approx.ftz.f32: within 2^-22, relative; 0 below 2^-126, infinite from 2^128 on. The host model
/// errs by one ulp, up or down, on most arguments, and stays at 2^127, of which the model of 1 / x
/// still knows the reciprocal.
KIMI_HOST_DEVICE float exp2_estimate(float a) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
#else
  const float r = std::fmin(std::exp2(a), 0x1p127f);
  return a != a ? a : r < 0x1p-125f ? 0.0f : float_of(bits_of(r) + bits_of(a) % 3 - 1);
#endif
}

struct EstimateOps : CudaOps {
  static KIMI_HOST_DEVICE F exp2_estimate(F a) { return kimi::exp2_estimate(a); }
};

}  // namespace kimi
