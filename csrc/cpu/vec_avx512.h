// SPDX-License-Identifier: MIT
// Vectors of fp32 on AVX-512 (F, BW, VL, DQ): 16 floats, with loads and stores of every dtype,
// whole, of the first lanes or around the cache. math/functions.h says what its operations must do.
// Included by files of this instruction set only.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "common/dtype.h"

namespace kimi::cpu {
namespace {  // every ISA file has its own copy

struct Avx512 {
  using F = __m512;
  using I = __m512i;
  using Mask = __mmask16;
  static constexpr int kLanes = 16;

  static F set(float x) { return _mm512_set1_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F sqrt(F a) { return _mm512_sqrt_ps(a); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  static F neg_abs(F a) { return _mm512_or_ps(a, set(-0.0f)); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }  // b if either is NaN
  static F max(F a, F b) { return _mm512_max_ps(a, b); }  // b if either is NaN

  // Division takes 16 cycles a vector: reciprocals are refined from 14 bits.
  static F reciprocal_estimate(F a) { return _mm512_rcp14_ps(a); }
  static F subtract_product(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }

  static Mask is_nan(F a) { return _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q); }
  static Mask less(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
  static Mask at_least(F a, F b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
  static Mask either(Mask a, Mask b) { return a | b; }
  static unsigned bits(Mask m) { return m; }
  static F select(Mask m, F a, F b) { return _mm512_mask_blend_ps(m, b, a); }

  static F scale_by_exponent_or_zero(Mask keep, F p, F shifted) {
    const I exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
    return _mm512_castsi512_ps(_mm512_maskz_add_epi32(keep, _mm512_castps_si512(p), exponent));
  }
  // x = significand(x) * 2^exponent(x) for normal positive x, the significand in [1, 2).
  static F exponent(F a) { return _mm512_getexp_ps(a); }
  static F significand(F a) { return _mm512_getmant_ps(a, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero); }

  static float reduce_max(F a) { return _mm512_reduce_max_ps(a); }
  static float reduce_min(F a) { return _mm512_reduce_min_ps(a); }
  // The sum of all lanes: lane l plus lane l^8, then l^4, then l^2, then l^1.
  static float sum_lanes(F a) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  // The first `left` lanes: all of them from kLanes on.
  static Mask first(int left) { return Mask(left >= kLanes ? 0xffff : (1u << left) - 1); }
  static F widen(const bf16*, __m256i a) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16));
  }
  static F widen(const fp16*, __m256i a) { return _mm512_cvtph_ps(a); }
  static F load(const float* x) { return _mm512_loadu_ps(x); }
  template <class T>
  static F load(const T* x) {
    return widen(x, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }
  // The first `left` lanes, zeros in the others.
  static F load(const float* x, int left) { return _mm512_maskz_loadu_ps(first(left), x); }
  template <class T>
  static F load(const T* x, int left) {
    return widen(x, _mm256_maskz_loadu_epi16(first(left), x));
  }
  template <class T>
  static F load_or(const T* x, int left, float other) {
    return select(first(left), load(x, left), set(other));
  }

  // As from_float<bf16>: nearest even, NaN made quiet.
  static __m256i round(bf16*, F a) {
    const I u = _mm512_castps_si512(a);
    const I odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const I up = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const I word = _mm512_mask_or_epi32(up, is_nan(a), u, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(word, 16));
  }
  // As from_float<fp16>: the hardware would keep the payload of a NaN.
  static __m256i round(fp16*, F a) {
    const F nan = _mm512_or_ps(_mm512_and_ps(a, set(-0.0f)), set(__builtin_nanf("")));
    return _mm512_cvtps_ph(select(is_nan(a), nan, a), _MM_FROUND_TO_NEAREST_INT);
  }
  static void store(float* x, F a) { _mm512_storeu_ps(x, a); }
  template <class T>
  static void store(T* x, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), round(x, a));
  }
  // The first `left` lanes.
  static void store(float* x, F a, int left) { _mm512_mask_storeu_ps(x, first(left), a); }
  template <class T>
  static void store(T* x, F a, int left) {
    _mm256_mask_storeu_epi16(x, first(left), round(x, a));
  }

  static void prefetch(const void* x) { _mm_prefetch(static_cast<const char*>(x), _MM_HINT_T0); }
  // Around the cache, where the address is aligned; a fence afterwards.
  static bool aligned(const void* x) { return reinterpret_cast<uintptr_t>(x) % 64 == 0; }
  static void fence() { _mm_sfence(); }
  static void stream(float* x, F a) { _mm512_stream_ps(x, a); }
  template <class T>
  static void stream(T* x, F a) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(x), round(x, a));
  }
  static void stream_copy(char* to, const char* from, int64_t bytes) {
    const int64_t head = int64_t(-reinterpret_cast<uintptr_t>(to) % 64);
    if (bytes < head + 64) {
      memcpy(to, from, size_t(bytes));
      return;
    }
    memcpy(to, from, size_t(head));
    int64_t at = head;
    for (; at + 64 <= bytes; at += 64)
      _mm512_stream_si512(reinterpret_cast<I*>(to + at), _mm512_loadu_si512(from + at));
    memcpy(to + at, from + at, size_t(bytes - at));
  }
};

}  // namespace
}  // namespace kimi::cpu
