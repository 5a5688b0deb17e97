// SPDX-License-Identifier: MIT
// Vectors of fp32 on AVX-512 (F, BW, VL): 16 floats a vector, with loads and stores of every dtype
// and stores around the cache. Included by files of this instruction set only.
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "common/dtype.h"

namespace kimi::cpu {
namespace {  // every ISA file has its own copy

struct Avx512Vec {
  using F = __m512;
  static constexpr int kLanes = 16;

  static F set(float x) { return _mm512_set1_ps(x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static void prefetch(const void* x) { _mm_prefetch(static_cast<const char*>(x), _MM_HINT_T0); }
  static void fence() { _mm_sfence(); }
  static bool aligned(const void* x) { return reinterpret_cast<uintptr_t>(x) % 64 == 0; }

  static F load(const float* x) { return _mm512_loadu_ps(x); }
  static F load(const bf16* x) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static F load(const fp16* x) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  }

  // As from_float<bf16>: nearest even, NaN made quiet.
  static __m256i round(bf16*, F a) {
    const __m512i u = _mm512_castps_si512(a);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q);
    const __m512i quiet = _mm512_or_si512(u, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(up, nan, quiet), 16));
  }
  // As from_float<fp16>: the hardware would keep the payload of a NaN.
  static __m256i round(fp16*, F a) {
    const F nan = _mm512_or_ps(_mm512_and_ps(a, set(-0.0f)), set(__builtin_nanf("")));
    const F one_nan = _mm512_mask_mov_ps(a, _mm512_cmp_ps_mask(a, a, _CMP_UNORD_Q), nan);
    return _mm512_cvtps_ph(one_nan, _MM_FROUND_TO_NEAREST_INT);
  }

  static void store(float* x, F a) { _mm512_storeu_ps(x, a); }
  static void stream(float* x, F a) { _mm512_stream_ps(x, a); }
  template <class T>
  static void store(T* x, F a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), round(x, a));
  }
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
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + at), _mm512_loadu_si512(from + at));
    memcpy(to + at, from + at, size_t(bytes - at));
  }
};

}  // namespace
}  // namespace kimi::cpu
