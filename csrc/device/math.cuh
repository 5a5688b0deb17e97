// SPDX-License-Identifier: MIT
//
// fp32 arithmetic that is rounded once, to nearest even, exactly where it is written: the compiler
// neither contracts a product and a sum into an fma nor replaces a division. Host code gets the
// same bits when it is built with -ffp-contract=off and without -ffast-math, as every target of
// this project is.
#pragma once

#include <cmath>

#include "device/platform.cuh"

namespace kimi {

#if defined(KIMI_HOST_SIMT)
#if defined(__FAST_MATH__)
#error "device/math.cuh: the host models need exact arithmetic; build without -ffast-math"
#endif
inline float add_rn(float a, float b) { return a + b; }
inline float sub_rn(float a, float b) { return a - b; }
inline float mul_rn(float a, float b) { return a * b; }
inline float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float div_rn(float a, float b) { return a / b; }
inline float reciprocal_rn(float a) { return 1.0f / a; }
inline float sqrt_rn(float a) { return std::sqrt(a); }
#else
/// add.rn.f32
__device__ inline float add_rn(float a, float b) { return __fadd_rn(a, b); }
/// sub.rn.f32
__device__ inline float sub_rn(float a, float b) { return __fsub_rn(a, b); }
/// mul.rn.f32
__device__ inline float mul_rn(float a, float b) { return __fmul_rn(a, b); }
/// fma.rn.f32: a * b + c, rounded once
__device__ inline float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
/// div.rn.f32
__device__ inline float div_rn(float a, float b) { return __fdiv_rn(a, b); }
/// rcp.rn.f32
__device__ inline float reciprocal_rn(float a) { return __frcp_rn(a); }
/// sqrt.rn.f32
__device__ inline float sqrt_rn(float a) { return __fsqrt_rn(a); }
#endif

}  // namespace kimi
