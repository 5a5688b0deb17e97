// SPDX-License-Identifier: MIT
// Storage types, their conversion to and from fp32, and the one dispatcher over dtypes.
#pragma once

#include <cstdint>
#include <cstring>

#include "kimi_ops.h"

// Always inlined: a copy that a wider instruction set's file emits must not serve other files.
#if defined(__CUDACC__)
#define KIMI_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define KIMI_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace kimi {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};
// FP8 without infinities: 4 bits of exponent (bias 7), 3 of significand, NaN is 0x7f and 0xff; 448
// at most.
struct e4m3 {
  uint8_t bits;
};

KIMI_HOST_DEVICE uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, sizeof u);
  return u;
}
KIMI_HOST_DEVICE float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
}

KIMI_HOST_DEVICE float to_float(float x) { return x; }
KIMI_HOST_DEVICE float to_float(bf16 x) { return float_of(uint32_t{x.bits} << 16); }
KIMI_HOST_DEVICE float to_float(fp16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | (magnitude << 13));  // inf, NaN
  // 2^-24 units for subnormals; otherwise rebias the exponent by 127 - 15.
  if (magnitude < 0x0400u) return float_of(sign | bits_of(float(magnitude) * 0x1p-24f));
  return float_of(sign | ((magnitude << 13) + (112u << 23)));
}

KIMI_HOST_DEVICE float to_float(e4m3 x) {
  const uint32_t sign = uint32_t(x.bits & 0x80u) << 24, magnitude = x.bits & 0x7fu;
  if (magnitude == 0x7fu) return float_of(sign | 0x7fc00000u);
  // 2^-9 units for subnormals; otherwise rebias the exponent by 127 - 7.
  if (magnitude < 0x08u) return float_of(sign | bits_of(float(magnitude) * 0x1p-9f));
  return float_of(sign | ((magnitude << 20) + (120u << 23)));
}

// Round to nearest, ties to even; NaN stays NaN.
template <class T>
KIMI_HOST_DEVICE T from_float(float x);
template <>
KIMI_HOST_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
KIMI_HOST_DEVICE bf16 from_float<bf16>(float x) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {uint16_t((u >> 16) | 0x40u)};
  return {uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}
template <>
KIMI_HOST_DEVICE fp16 from_float<fp16>(float x) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // 65520 rounds to infinity
  if (magnitude < 0x38800000u) {                                    // below 2^-14: subnormal
    // Adding 0.5 aligns the significand to units of 2^-24 with the rounding of the addition.
    return {uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u))};
  }
  return {uint16_t(sign | ((magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13))};
}

// Saturates: infinities and what would round past 448 become 448; every NaN becomes 0x7f.
template <>
KIMI_HOST_DEVICE e4m3 from_float<e4m3>(float x) {
  const uint32_t u = bits_of(x), sign = (u >> 24) & 0x80u, magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {uint8_t(0x7fu)};
  if (magnitude >= 0x43e00000u) return {uint8_t(sign | 0x7eu)};  // 448
  if (magnitude < 0x3c800000u) {                                 // below 2^-6: subnormal
    // Adding 2^14 aligns the significand to units of 2^-9 with the rounding of the addition.
    return {uint8_t(sign | (bits_of(float_of(magnitude) + 0x1p14f) - 0x46800000u))};
  }
  return {uint8_t(sign | ((magnitude - (120u << 23) + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20))};
}

template <class T>
inline constexpr kimi_dtype kDtype = KIMI_FLOAT32;
template <>
inline constexpr kimi_dtype kDtype<bf16> = KIMI_BFLOAT16;
template <>
inline constexpr kimi_dtype kDtype<fp16> = KIMI_FLOAT16;

/// Bytes of a value.
inline int64_t size_of(kimi_dtype dtype) { return dtype == KIMI_FLOAT32 ? 4 : 2; }

inline bool is_dtype(int dtype) { return dtype >= KIMI_FLOAT32 && dtype <= KIMI_FLOAT16; }

// dispatch(dtype, [&]<class T>() { ... }): the dtype has been checked before.
template <class Visitor>
auto dispatch(kimi_dtype dtype, Visitor&& visit) {
  switch (dtype) {
    case KIMI_BFLOAT16:
      return visit.template operator()<bf16>();
    case KIMI_FLOAT16:
      return visit.template operator()<fp16>();
    default:
      return visit.template operator()<float>();
  }
}

}  // namespace kimi
