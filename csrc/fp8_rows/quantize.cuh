// SPDX-License-Identifier: MIT
// A block of FP8 on CUDA: its scale, and its values divided by it. Divisions are products with a
// reciprocal and two corrections, the second of which is exact by Markstein's theorem: a division
// instruction has a slow path, which is a call.
#pragma once

#include <cfloat>

#include "device/convert.cuh"
#include "device/math.cuh"
#include "fp8_rows/fp8_rows.h"

namespace kimi::fp8 {

inline constexpr uint32_t kSign = 0x80000000u;

// Of values as integers, so that a NaN is above all numbers.
KIMI_HOST_DEVICE uint32_t size_bits(float x) { return bits_of(x) & ~kSign; }

// most / 448 as IEEE rounds it, 2^-126 at least; infinity and NaN stay.
KIMI_HOST_DEVICE float scale_of(float most) {
  constexpr float kPart = 1.0f / kMax;
  float q = mul_rn(most, kPart);
  q = fma_rn(fma_rn(-q, kMax, most), kPart, q);
  q = fma_rn(fma_rn(-q, kMax, most), kPart, q);
  if (!(most <= FLT_MAX)) q = most;
  return q < kSmallestScale ? kSmallestScale : q;
}

// x / scale as IEEE rounds it, where that is 2^-11 or more; e4m3 makes 0 of less. A multiple of the
// divisor by a power of two keeps remainders normal.
class Divide {
 public:
  __device__ explicit Divide(float scale) {
    up_ = scale < 0x1p-60f ? 0x1p64f : 1.0f;
    divisor_ = mul_rn(scale, up_);
    reciprocal_ = reciprocal_rn(divisor_);
    if (!(divisor_ <= FLT_MAX)) divisor_ = 0.0f;  // no corrections: x / inf = 0, inf / inf is NaN
  }
  __device__ float operator()(float x) const {
    const float size = mul_rn(float_of(size_bits(x)), up_);
    float q = mul_rn(size, reciprocal_);
    q = fma_rn(fma_rn(-q, divisor_, size), reciprocal_, q);
    q = fma_rn(fma_rn(-q, divisor_, size), reciprocal_, q);
    return float_of(bits_of(q) | (bits_of(x) & kSign));
  }

 private:
  float up_, divisor_, reciprocal_;
};

}  // namespace kimi::fp8
