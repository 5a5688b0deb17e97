// SPDX-License-Identifier: MIT
// The vectors of vec_math_avx2.h and vec_math_avx512.h with one lane: templates over them are the
// portable engines, and define what the others compute.
#pragma once

#include <stdint.h>

#include "common/dtype.h"

namespace kimi::cpu {
namespace {

struct PortableVec {
  using F = float;
  using Mask = bool;
  static constexpr int kLanes = 1;

  static F set(float x) { return x; }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
  static F sqrt(F a) { return __builtin_sqrtf(a); }
  static F abs(F a) { return __builtin_fabsf(a); }
  static F max(F a, F b) { return a > b ? a : b; }  // b if either is NaN
  static Mask greater(F a, F b) { return a > b; }
  static Mask is_nan(F a) { return a != a; }
  static Mask either(Mask a, Mask b) { return a || b; }
  static bool any(Mask a) { return a; }
  static Mask none() { return false; }
  static F select(Mask m, F a, F b) { return m ? a : b; }

  template <class T>
  static F load(const T* x) {
    return to_float(*x);
  }
  template <class T>
  static void store(T* x, F a) {
    *x = from_float<T>(a);
  }
};

}  // namespace
}  // namespace kimi::cpu
