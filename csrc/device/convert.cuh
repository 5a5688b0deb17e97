// SPDX-License-Identifier: MIT
//
// Two fp32 values to a pair of 16-bit ones in one instruction (sm_80 for bf16).
#pragma once

#include <type_traits>

#include "common/dtype.h"
#include "device/platform.cuh"

namespace kimi {

/// cvt.rn.{bf16x2,f16x2}.f32: `low` in the low half. Rounds like from_float; every NaN becomes
/// 0x7fff.
#if defined(KIMI_HOST_SIMT)
template <class T>
uint32_t round_pair(float low, float high) {
  const auto half = [](float x) {
    return uint32_t{x != x ? uint16_t{0x7fff} : from_float<T>(x).bits};
  };
  return half(low) | half(high) << 16;
}
#else
template <class T>
__device__ __forceinline__ uint32_t round_pair(float low, float high) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
  uint32_t pair;
  if constexpr (std::is_same_v<T, bf16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
#endif

}  // namespace kimi
