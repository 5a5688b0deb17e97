// SPDX-License-Identifier: MIT
// Vectors of fp32 on AVX2, FMA and F16C: 8 floats a vector, with loads and stores of every dtype
// and stores around the cache. Included by files of this instruction set only.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "common/dtype.h"

namespace kimi::cpu {
namespace {  // every ISA file has its own copy

struct Avx2Vec {
  using F = __m256;
  static constexpr int kLanes = 8;

  static F set(float x) { return _mm256_set1_ps(x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static void prefetch(const void* x) { _mm_prefetch(static_cast<const char*>(x), _MM_HINT_T0); }
  static void fence() { _mm_sfence(); }
  static bool aligned(const void* x) { return reinterpret_cast<uintptr_t>(x) % 32 == 0; }

  static __m128i load_halves(const void* x) {
    return _mm_loadu_si128(static_cast<const __m128i*>(x));
  }
  static F load(const float* x) { return _mm256_loadu_ps(x); }
  static F load(const bf16* x) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_halves(x)), 16));
  }
  static F load(const fp16* x) { return _mm256_cvtph_ps(load_halves(x)); }

  // As from_float<bf16>: nearest even, NaN made quiet.
  static __m128i round(bf16*, F a) {
    const __m256i u = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i up = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i word = _mm256_srli_epi32(_mm256_blendv_epi8(up, quiet, nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(word), _mm256_extracti128_si256(word, 1));
  }
  // As from_float<fp16>: the hardware would keep the payload of a NaN.
  static __m128i round(fp16*, F a) {
    const F sign = _mm256_and_ps(a, set(-0.0f)), nan = _mm256_or_ps(sign, set(__builtin_nanf("")));
    const F one_nan = _mm256_blendv_ps(a, nan, _mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    return _mm256_cvtps_ph(one_nan, _MM_FROUND_TO_NEAREST_INT);
  }

  static void store(float* x, F a) { _mm256_storeu_ps(x, a); }
  static void stream(float* x, F a) { _mm256_stream_ps(x, a); }
  template <class T>
  static void store(T* x, F a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(x), round(x, a));
  }
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
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + at),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + at)));
    memcpy(to + at, from + at, size_t(bytes - at));
  }
};

}  // namespace
}  // namespace kimi::cpu
