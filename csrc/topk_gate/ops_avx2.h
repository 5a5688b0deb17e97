// SPDX-License-Identifier: MIT
// The operations of score.h and score_row_simd.h on AVX2, FMA and F16C: 8 floats; division is the
// hardware's. Included by files of this instruction set only.
#pragma once

#include <immintrin.h>

#include "topk_gate/score_row_simd.h"

namespace kimi::gate {
namespace {

struct Avx2 {
  using F = __m256;
  using I = __m256i;
  static constexpr int kLanes = 8;

  static F set(float x) { return _mm256_set1_ps(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F neg_abs(F a) { return _mm256_or_ps(a, set(-0.0f)); }
  static F min_finite(F a) { return _mm256_min_ps(a, set(kMaxFloat)); }
  static F is_nan(F a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
  static F less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static F at_least(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
  static F select(F mask, F a, F b) { return _mm256_blendv_ps(b, a, mask); }
  static F scale_by_exponent_or_zero(F keep, F p, F shifted) {
    const I exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    const I scaled = _mm256_add_epi32(_mm256_castps_si256(p), exponent);
    return _mm256_and_ps(keep, _mm256_castsi256_ps(scaled));
  }
  static F reciprocal(F d) { return reciprocal_by_division<Avx2>(d); }
  static float reduce_max(F a) {
    alignas(32) float lanes[kLanes];
    _mm256_store_ps(lanes, a);
    for (int i = 1; i < kLanes; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    return lanes[0];
  }

  static I first(int left) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(left), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static __m128i load_halves(const void* x, int left) {
    if (left >= kLanes) return _mm_loadu_si128(static_cast<const __m128i*>(x));
    alignas(16) uint16_t lanes[kLanes] = {};
    memcpy(lanes, x, sizeof(uint16_t) * left);
    return _mm_load_si128(reinterpret_cast<const __m128i*>(lanes));
  }
  static F load_all(const float* x) { return _mm256_loadu_ps(x); }
  static F load(const float* x, int left) {
    return left >= kLanes ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, first(left));
  }
  static F load(const bf16* x, int left) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(x, left)), 16));
  }
  static F load(const fp16* x, int left) { return _mm256_cvtph_ps(load_halves(x, left)); }
  template <class T>
  static F load_or(const T* x, int left, float other) {
    return select(_mm256_castsi256_ps(first(left)), load(x, left), set(other));
  }
  static void store(float* x, F a) { _mm256_storeu_ps(x, a); }
  // from_float and a store of the first `left` lanes.
  static void store_as(float* x, int left, F a) {
    left >= kLanes ? _mm256_storeu_ps(x, a) : _mm256_maskstore_ps(x, first(left), a);
  }
  static void store_as(bf16* x, int left, F a) {
    const I bits = _mm256_castps_si256(a), high = _mm256_srli_epi32(bits, 16);
    const I odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
    const I half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
    const I rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
    const I nan = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
    store_low_halves(x, left, _mm256_blendv_epi8(rounded, nan, _mm256_castps_si256(is_nan(a))));
  }
  static void store_as(fp16* x, int left, F a) {
    const F sign = _mm256_and_ps(a, set(-0.0f)), nan = _mm256_or_ps(sign, set(__builtin_nanf("")));
    store_halves(x, left, _mm256_cvtps_ph(select(is_nan(a), nan, a), _MM_FROUND_TO_NEAREST_INT));
  }
  static void store_low_halves(void* x, int left, I a) {
    const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, a), 0x08);
    store_halves(x, left, _mm256_castsi256_si128(packed));
  }
  static void store_halves(void* x, int left, __m128i a) {
    if (left >= kLanes) return _mm_storeu_si128(static_cast<__m128i*>(x), a);
    alignas(16) uint16_t lanes[kLanes];
    _mm_store_si128(reinterpret_cast<__m128i*>(lanes), a);
    memcpy(x, lanes, sizeof(uint16_t) * left);
  }

  // The sum of all lanes: lane l plus lane l^4, then l^2, then l^1.
  static float sum_lanes(F a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  // x = significand(x) * 2^exponent(x) for normal positive x, the significand in [1, 2).
  static F exponent(F a) {
    const I biased = _mm256_srli_epi32(_mm256_castps_si256(a), 23);
    return _mm256_cvtepi32_ps(_mm256_sub_epi32(biased, _mm256_set1_epi32(127)));
  }
  static F significand(F a) {
    const F fraction = _mm256_castsi256_ps(_mm256_set1_epi32(0x007fffff));
    return _mm256_or_ps(_mm256_and_ps(a, fraction), set(1.0f));
  }
};

}  // namespace
}  // namespace kimi::gate
