// SPDX-License-Identifier: MIT
// The vectors of vec_avx2.h and vec_avx512.h with one lane: templates over them are the portable
// engines, and define what the others compute. Included by those engines only.
#pragma once

#include <stdint.h>
#include <string.h>

#include "math/one_float.h"

namespace kimi::cpu {
namespace {

struct Portable : OneFloat {
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F fma(F a, F b, F c) { return __builtin_fmaf(a, b, c); }
  static F sqrt(F a) { return __builtin_sqrtf(a); }
  static unsigned bits(Mask m) { return m; }
  static float reduce_max(F a) { return a; }

  template <class T>
  static F load(const T* x, int /*left*/ = 1) {
    return to_float(*x);
  }
  template <class T>
  static void store(T* x, F a, int /*left*/ = 1) {
    *x = from_float<T>(a);
  }

  // There is no way around the cache.
  static void prefetch(const void*) {}
  static void fence() {}
  static bool aligned(const void*) { return false; }
  template <class T>
  static void stream(T* x, F a) {
    store(x, a);
  }
  static void stream_copy(char* to, const char* from, int64_t bytes) {
    memcpy(to, from, size_t(bytes));
  }
};

}  // namespace
}  // namespace kimi::cpu
