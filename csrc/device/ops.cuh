// SPDX-License-Identifier: MIT
// The operations of math/functions.h on one float of a GPU.
#pragma once

#include "device/math.cuh"
#include "math/one_float.h"

namespace kimi {

struct CudaOps : OneFloat {
  static KIMI_HOST_DEVICE F add(F a, F b) { return add_rn(a, b); }
  static KIMI_HOST_DEVICE F sub(F a, F b) { return sub_rn(a, b); }
  static KIMI_HOST_DEVICE F mul(F a, F b) { return mul_rn(a, b); }
  static KIMI_HOST_DEVICE F div(F a, F b) { return div_rn(a, b); }
  static KIMI_HOST_DEVICE F fma(F a, F b, F c) { return fma_rn(a, b, c); }
  static KIMI_HOST_DEVICE F sqrt(F a) { return sqrt_rn(a); }
  // Without the slow path of a division.
  static KIMI_HOST_DEVICE F reciprocal_estimate(F a) { return kimi::reciprocal_estimate(a); }
  static KIMI_HOST_DEVICE F subtract_product(F a, F b, F c) { return fma_rn(-a, b, c); }
};

}  // namespace kimi
