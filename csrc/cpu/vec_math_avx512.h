// SPDX-License-Identifier: MIT
// More operations on vec_avx512.h's vectors. Included by files of this instruction set only.
#pragma once

#include "cpu/vec_avx512.h"

namespace kimi::cpu {
namespace {  // every ISA file has its own copy

struct Avx512Math : Avx512Vec {
  using Mask = __mmask16;

  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }  // b if either is NaN
  static Mask greater(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static Mask is_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
  static Mask either(Mask a, Mask b) { return a | b; }
  static bool any(Mask a) { return a != 0; }
  static Mask none() { return 0; }
  static F select(Mask m, F a, F b) { return _mm512_mask_mov_ps(b, m, a); }
};

}  // namespace
}  // namespace kimi::cpu
