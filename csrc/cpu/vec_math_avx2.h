// SPDX-License-Identifier: MIT
// More operations on vec_avx2.h's vectors. Included by files of this instruction set only.
#pragma once

#include "cpu/vec_avx2.h"

namespace kimi::cpu {
namespace {  // every ISA file has its own copy

struct Avx2Math : Avx2Vec {
  using Mask = __m256;

  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }  // b if either is NaN
  static Mask greater(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
  static Mask is_nan(F a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
  static Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
  static bool any(Mask a) { return _mm256_movemask_ps(a) != 0; }
  static Mask none() { return _mm256_setzero_ps(); }
  static F select(Mask m, F a, F b) { return _mm256_blendv_ps(b, a, m); }
};

}  // namespace
}  // namespace kimi::cpu
