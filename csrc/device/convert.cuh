// SPDX-License-Identifier: MIT
//
// Two fp32 values to a pair of narrower ones in one instruction (sm_80 for bf16, sm_89 for FP8).
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

/// What round_pair packed, or any pair of T, as fp32: exact.
#if defined(KIMI_HOST_SIMT)
template <class T>
void widen_pair(uint32_t pair, float& low, float& high) {
  low = to_float(T{static_cast<uint16_t>(pair)});
  high = to_float(T{static_cast<uint16_t>(pair >> 16)});
}
#else
template <class T>
__device__ __forceinline__ void widen_pair(uint32_t pair, float& low, float& high) {
  static_assert(std::is_same_v<T, bf16> || std::is_same_v<T, fp16>);
  if constexpr (std::is_same_v<T, bf16>) {
    low = float_of(pair << 16);
    high = float_of(pair & 0xffff0000u);
  } else {
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(low), "=f"(high)
        : "r"(pair));
  }
}
#endif

/// cvt.rn.satfinite.e4m3x2.f32 from sm_89 on, else the same values by integers: `low` in bits 0-7,
/// `high` in bits 8-15. Saturates to 448; every NaN becomes 0x7f.
__device__ inline uint32_t round_pair_e4m3(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return uint32_t{from_float<e4m3>(low).bits} | uint32_t{from_float<e4m3>(high).bits} << 8;
#endif
}

}  // namespace kimi
