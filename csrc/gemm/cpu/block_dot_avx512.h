// SPDX-License-Identifier: MIT
// Products with few tokens on AVX-512. Beyond kDotTokens and kSpreadTokens packed strips are as fast
// (measured on Zen 4). Included by the ISA files only.
#pragma once

#include <immintrin.h>

#include "cpu/vec_avx512.h"
#include "gemm/cpu/block_dot_simd.h"
#include "gemm/cpu/block_pack_avx512.h"
#include "gemm/cpu/block_spread_simd.h"

namespace kimi::cpu {
namespace {  // every ISA file has its own copy

constexpr int64_t kDotTokens = 20, kSpreadTokens = 8;

struct DotSums {
  using F = __m512;
  static constexpr int kRows[] = {8, 8, 8, 6, 4, 4};
  static constexpr int64_t kPassTokens = 6, kOnePass = 6;
  static constexpr bool kHoldsRows = true, kScales = false;

  static F zero() { return _mm512_setzero_ps(); }

  static void store_sums(float* to, int n, F a, F b, F c, F d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d ab64 = _mm512_castps_pd(ab), cd64 = _mm512_castps_pd(cd);
    const __m512 quarters = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab64, cd64)),
                                          _mm512_castpd_ps(_mm512_unpackhi_pd(ab64, cd64)));
    const __m256 halves =
        _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    const __m128 sums =
        _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
    _mm_mask_storeu_ps(to, n >= 4 ? 0xf : __mmask8((1 << n) - 1), sums);
  }
};

}  // namespace
}  // namespace kimi::cpu
