// SPDX-License-Identifier: MIT
//
// fp32 arithmetic that is rounded once, to nearest even, exactly where it is written: the compiler
// neither contracts a product and a sum into an fma nor approximates a division. Host code gets the
// same bits when it is built with -ffp-contract=off and without -ffast-math, as every target of
// this project is.
#pragma once

#include <cmath>

#include "common/dtype.h"

#if defined(__FAST_MATH__)
#error "device/math.cuh needs exact arithmetic: build without -ffast-math"
#endif

#if defined(__CUDA_ARCH__)
#define KIMI_DEVICE_OR_HOST(device, host) return device
#else
#define KIMI_DEVICE_OR_HOST(device, host) return host
#endif

namespace kimi {

/// add.rn.f32
KIMI_HOST_DEVICE float add_rn(float a, float b) { KIMI_DEVICE_OR_HOST(__fadd_rn(a, b), a + b); }
/// sub.rn.f32
KIMI_HOST_DEVICE float sub_rn(float a, float b) { KIMI_DEVICE_OR_HOST(__fsub_rn(a, b), a - b); }
/// mul.rn.f32
KIMI_HOST_DEVICE float mul_rn(float a, float b) { KIMI_DEVICE_OR_HOST(__fmul_rn(a, b), a * b); }
/// mul.rn.f64
KIMI_HOST_DEVICE double mul_rn(double a, double b) { KIMI_DEVICE_OR_HOST(__dmul_rn(a, b), a * b); }
/// fma.rn.f32: a * b + c, rounded once
KIMI_HOST_DEVICE float fma_rn(float a, float b, float c) {
  KIMI_DEVICE_OR_HOST(__fmaf_rn(a, b, c), std::fma(a, b, c));
}
/// div.rn.f32
KIMI_HOST_DEVICE float div_rn(float a, float b) { KIMI_DEVICE_OR_HOST(__fdiv_rn(a, b), a / b); }
/// rcp.rn.f32
KIMI_HOST_DEVICE float reciprocal_rn(float a) { KIMI_DEVICE_OR_HOST(__frcp_rn(a), 1.0f / a); }
/// rcp.approx.ftz.f32 for normal numbers: within one ulp. The host model errs by one ulp, up or
/// down, on most arguments, so that a result that depends on the estimate does not pass the tests
/// there.
KIMI_HOST_DEVICE float reciprocal_estimate(float a) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(a));
  return r;
#else
  return float_of(bits_of(1.0f / a) + bits_of(a) % 3 - 1);
#endif
}
/// max.NaN.f32: NaN if either is.
KIMI_HOST_DEVICE float max_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
#else
  return a > b || a != a ? a : b;
#endif
}
/// sqrt.rn.f32
KIMI_HOST_DEVICE float sqrt_rn(float a) { KIMI_DEVICE_OR_HOST(__fsqrt_rn(a), std::sqrt(a)); }

}  // namespace kimi

#undef KIMI_DEVICE_OR_HOST
