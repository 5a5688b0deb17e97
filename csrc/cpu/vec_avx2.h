// SPDX-License-Identifier: MIT
// Vectors of fp32 on AVX2, FMA and F16C: 8 floats, with loads and stores of every dtype, whole, of
// the first lanes or around the cache. math/functions.h says what its operations must do; division
// is the hardware's. Included by files of this instruction set only.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "common/dtype.h"

namespace kimi::cpu {
namespace {  // every ISA file has its own copy

struct Avx2 {
  using F = __m256;
  using I = __m256i;
  using Mask = __m256;
  static constexpr int kLanes = 8;

  static F set(float x) { return _mm256_set1_ps(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F sqrt(F a) { return _mm256_sqrt_ps(a); }
  static F abs(F a) { return _mm256_andnot_ps(set(-0.0f), a); }
  static F neg_abs(F a) { return _mm256_or_ps(a, set(-0.0f)); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }  // b if either is NaN
  static F max(F a, F b) { return _mm256_max_ps(a, b); }  // b if either is NaN

  static Mask is_nan(F a) { return _mm256_cmp_ps(a, a, _CMP_UNORD_Q); }
  static Mask less(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
  static Mask at_least(F a, F b) { return _mm256_cmp_ps(a, b, _CMP_GE_OQ); }
  static Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
  static unsigned bits(Mask m) { return unsigned(_mm256_movemask_ps(m)); }
  static F select(Mask m, F a, F b) { return _mm256_blendv_ps(b, a, m); }

  static F scale_by_exponent_or_zero(Mask keep, F p, F shifted) {
    const I exponent = _mm256_slli_epi32(_mm256_castps_si256(shifted), 23);
    const I scaled = _mm256_add_epi32(_mm256_castps_si256(p), exponent);
    return _mm256_and_ps(keep, _mm256_castsi256_ps(scaled));
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

  static float reduce_max(F a) {
    alignas(32) float lanes[kLanes];
    _mm256_store_ps(lanes, a);
    for (int i = 1; i < kLanes; ++i) lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    return lanes[0];
  }
  static float reduce_min(F a) { return -reduce_max(_mm256_xor_ps(a, set(-0.0f))); }
  // The sum of all lanes: lane l plus lane l^4, then l^2, then l^1.
  static float sum_lanes(F a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  // The first `left` lanes: all of them from kLanes on.
  static I first(int left) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(left), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static F widen(const bf16*, __m128i a) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16));
  }
  static F widen(const fp16*, __m128i a) { return _mm256_cvtph_ps(a); }
  static F load(const float* x) { return _mm256_loadu_ps(x); }
  template <class T>
  static F load(const T* x) {
    return widen(x, _mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  }
  // The first `left` lanes, zeros in the others.
  static F load(const float* x, int left) {
    return left >= kLanes ? load(x) : _mm256_maskload_ps(x, first(left));
  }
  template <class T>
  static F load(const T* x, int left) {
    if (left >= kLanes) return load(x);
    alignas(16) uint16_t lanes[kLanes] = {};
    memcpy(lanes, x, sizeof(uint16_t) * left);
    return widen(x, _mm_load_si128(reinterpret_cast<const __m128i*>(lanes)));
  }
  template <class T>
  static F load_or(const T* x, int left, float other) {
    return select(_mm256_castsi256_ps(first(left)), load(x, left), set(other));
  }

  // As from_float<bf16>: nearest even, NaN made quiet.
  static __m128i round(bf16*, F a) {
    const I u = _mm256_castps_si256(a);
    const I odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const I up = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const I quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const I word = _mm256_blendv_epi8(up, quiet, _mm256_castps_si256(is_nan(a)));
    const I high = _mm256_srli_epi32(word, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
  }
  // As from_float<fp16>: the hardware would keep the payload of a NaN.
  static __m128i round(fp16*, F a) {
    const F nan = _mm256_or_ps(_mm256_and_ps(a, set(-0.0f)), set(__builtin_nanf("")));
    return _mm256_cvtps_ph(select(is_nan(a), nan, a), _MM_FROUND_TO_NEAREST_INT);
  }
  static void store(float* x, F a) { _mm256_storeu_ps(x, a); }
  template <class T>
  static void store(T* x, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x), round(x, a));
  }
  // The first `left` lanes.
  static void store(float* x, F a, int left) {
    left >= kLanes ? store(x, a) : _mm256_maskstore_ps(x, first(left), a);
  }
  template <class T>
  static void store(T* x, F a, int left) {
    if (left >= kLanes) return store(x, a);
    alignas(16) uint16_t lanes[kLanes];
    _mm_store_si128(reinterpret_cast<__m128i*>(lanes), round(x, a));
    memcpy(x, lanes, sizeof(uint16_t) * left);
  }

  static void prefetch(const void* x) { _mm_prefetch(static_cast<const char*>(x), _MM_HINT_T0); }
  // Around the cache, where the address is aligned; a fence afterwards.
  static bool aligned(const void* x) { return reinterpret_cast<uintptr_t>(x) % 32 == 0; }
  static void fence() { _mm_sfence(); }
  static void stream(float* x, F a) { _mm256_stream_ps(x, a); }
  template <class T>
  static void stream(T* x, F a) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(x), round(x, a));
  }
  static void stream_copy(char* to, const char* from, int64_t bytes) {
    const int64_t head = int64_t(-reinterpret_cast<uintptr_t>(to) % 32);
    if (bytes < head + 32) {
      memcpy(to, from, size_t(bytes));
      return;
    }
    memcpy(to, from, size_t(head));
    int64_t at = head;
    for (; at + 32 <= bytes; at += 32)
      _mm256_stream_si256(reinterpret_cast<I*>(to + at),
                          _mm256_loadu_si256(reinterpret_cast<const I*>(from + at)));
    memcpy(to + at, from + at, size_t(bytes - at));
  }
};

}  // namespace
}  // namespace kimi::cpu
