// SPDX-License-Identifier: MIT
// The operations of score.h and score_row_simd.h on AVX-512 (F, BW, VL, DQ): 16 floats. Division
// would take 16 cycles a vector, so the reciprocal is refined from VRCP14PS. Included by files of
// this instruction set only.
#pragma once

#include <immintrin.h>

#include "topk_gate/score_row_simd.h"

namespace kimi::gate {
namespace {

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  static constexpr int kLanes = 16;

  static F set(float x) { return _mm512_set1_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F neg_abs(F a) { return _mm512_or_ps(a, set(-0.0f)); }
  static F min_finite(F a) { return _mm512_min_ps(a, set(kMaxFloat)); }
  static __mmask16 is_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
  static __mmask16 less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static __mmask16 at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static F select(__mmask16 m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }
  static F scale_by_exponent_or_zero(__mmask16 keep, F p, F shifted) {
    const I exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(keep, _mm512_castps_si512(p), exponent));
  }
  static F reciprocal(F d) {  // 14 bits, 28 bits, exact
    const F one = set(1.0f), first = _mm512_rcp14_ps(d);
    const F second = fma(first, _mm512_fnmadd_ps(d, first, one), first);
    const F third = fma(second, _mm512_fnmadd_ps(d, second, one), second);
    return select(less(set(0x1.fffffcp0f), d), set(0.5f), third);
  }
  static float reduce_max(F a) { return _mm512_reduce_max_ps(a); }

  static __mmask16 first(int left) { return __mmask16(left >= 16 ? 0xffff : (1u << left) - 1); }
  static F load_all(const float* x) { return _mm512_loadu_ps(x); }
  static F load(const float* x, int left) { return _mm512_maskz_loadu_ps(first(left), x); }
  static F load(const bf16* x, int left) {
    const __m256i half = _mm256_maskz_loadu_epi16(first(left), x);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static F load(const fp16* x, int left) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(left), x));
  }
  template <class T>
  static F load_or(const T* x, int left, float other) {
    return _mm512_mask_blend_ps(first(left), set(other), load(x, left));
  }
  static void store(float* x, F a) { _mm512_storeu_ps(x, a); }
  // from_float and a store of the first `left` lanes.
  static void store_as(float* x, int left, F a) { _mm512_mask_storeu_ps(x, first(left), a); }
  static void store_as(bf16* x, int left, F a) {
    const I bits = _mm512_castps_si512(a), high = _mm512_srli_epi32(bits, 16);
    const I odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    const I half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
    const I rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
    const I result = _mm512_mask_or_epi32(rounded, is_nan(a), high, _mm512_set1_epi32(0x40));
    _mm256_mask_storeu_epi16(x, first(left), _mm512_cvtepi32_epi16(result));
  }
  static void store_as(fp16* x, int left, F a) {
    const F nan = _mm512_or_ps(_mm512_and_ps(a, set(-0.0f)), set(__builtin_nanf("")));
    const F cleaned = select(is_nan(a), nan, a);
    _mm256_mask_storeu_epi16(x, first(left), _mm512_cvtps_ph(cleaned, _MM_FROUND_TO_NEAREST_INT));
  }

  // The sum of all lanes: lane l plus lane l^8, then l^4, then l^2, then l^1.
  static float sum_lanes(F a) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  // x = significand(x) * 2^exponent(x) for normal positive x, the significand in [1, 2).
  static F exponent(F a) { return _mm512_getexp_ps(a); }
  static F significand(F a) { return _mm512_getmant_ps(a, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero); }
};

}  // namespace
}  // namespace kimi::gate
