// SPDX-License-Identifier: MIT
//
// Two fp32 values as a pair of narrower ones, rounded to nearest even, in one instruction.
#pragma once

#include "common/dtype.h"
#include "device/platform.cuh"

namespace kimi {

/// cvt.rn.bf16x2.f32 or cvt.rn.f16x2.f32: `low` in the lower half. Every NaN becomes 0x7fff.
template <class T>
__device__ inline uint32_t convert_pair(float low, float high) {
  static_assert(sizeof(T) == 2);
#if defined(KIMI_HOST_SIMT)
  const uint32_t l = low == low ? from_float<T>(low).bits : 0x7fffu;
  const uint32_t h = high == high ? from_float<T>(high).bits : 0x7fffu;
  return l | h << 16;
#else
  uint32_t pair;
  if constexpr (kDtype<T> == KIMI_BFLOAT16)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#endif
}

/// cvt.rn.satfinite.e4m3x2.f32 from sm_89 on, else the same values by integers: `low` in bits 0-7,
/// `high` in bits 8-15. Saturates to 448; every NaN becomes 0x7f.
__device__ inline uint32_t convert_pair_e4m3(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return uint32_t{from_float<e4m3>(low).bits} | uint32_t{from_float<e4m3>(high).bits} << 8;
#endif
}

}  // namespace kimi
