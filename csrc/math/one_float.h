// SPDX-License-Identifier: MIT
// Operations of the vector classes (cpu/vec_*.h, device/ops.cuh) on one float: those that round
// nothing, which the portable engines and CUDA share.
#pragma once

#include <cmath>

#include "common/dtype.h"

namespace kimi {

struct OneFloat {
  using F = float;
  using Mask = bool;
  static constexpr int kLanes = 1;

  static KIMI_HOST_DEVICE F set(float x) { return x; }
  static KIMI_HOST_DEVICE F abs(F a) { return fabsf(a); }
  static KIMI_HOST_DEVICE F neg_abs(F a) { return -fabsf(a); }
  static KIMI_HOST_DEVICE F min(F a, F b) { return a < b ? a : b; }  // b if either is NaN
  static KIMI_HOST_DEVICE F max(F a, F b) { return a > b ? a : b; }  // b if either is NaN
  static KIMI_HOST_DEVICE Mask is_nan(F a) { return a != a; }
  static KIMI_HOST_DEVICE Mask less(F a, F b) { return a < b; }
  static KIMI_HOST_DEVICE Mask at_least(F a, F b) { return a >= b; }
  static KIMI_HOST_DEVICE Mask either(Mask a, Mask b) { return a || b; }
  static KIMI_HOST_DEVICE F select(Mask m, F a, F b) { return m ? a : b; }
  static KIMI_HOST_DEVICE F scale_by_exponent_or_zero(Mask keep, F p, F shifted) {
    return keep ? float_of(bits_of(p) + (bits_of(shifted) << 23)) : 0.0f;
  }
  // x = significand(x) * 2^exponent(x) for normal positive x, the significand in [1, 2).
  static KIMI_HOST_DEVICE F exponent(F a) {
    return static_cast<float>(static_cast<int>(bits_of(a) >> 23) - 127);
  }
  static KIMI_HOST_DEVICE F significand(F a) {
    return float_of((bits_of(a) & 0x007fffffu) | 0x3f800000u);
  }
};

}  // namespace kimi
