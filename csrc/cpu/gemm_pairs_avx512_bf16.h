// SPDX-License-Identifier: MIT
// Pairs of bf16 as the compute type of packing and of dot products; shared with the AMX engine.
#pragma once

#include "cpu/gemm_pack_avx512.h"

namespace kimi::cpu {
namespace {

inline __m512i pair_of_vectors(__m512 low, __m512 high) {
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

struct Pairs {
  static constexpr int64_t kSpan = 32, kPair = 2;
  static constexpr Storage kStorage = Storage::kBfloat16;

  template <Storage S>
  static __m512i row(const Operand& x, int64_t row, int64_t depth, int64_t n) {
    if constexpr (S == Storage::kBfloat16)
      return _mm512_maskz_loadu_epi16(
          first32(n), static_cast<const bf16*>(x.data) + row * x.row_stride + depth);
    return pair_of_vectors(row16<S>(x, row, depth, n < 16 ? n : 16),
                           n > 16 ? row16<S>(x, row, depth + 16, n - 16) : _mm512_setzero_ps());
  }
  // Depth 0 in the low halves of the words, depth 1 in the high ones.
  template <Storage S>
  static __m512i column(const Operand& x, const int64_t at[], __mmask16 n) {
    return _mm512_or_si512(half<S>(x, at[0], n), _mm512_slli_epi32(half<S>(x, at[1], n), 16));
  }
  static uint32_t word(const float values[]) {
    return from_float<bf16>(values[0]).bits | uint32_t(from_float<bf16>(values[1]).bits) << 16;
  }

 private:
  template <Storage S>
  static __m512i half(const Operand& x, int64_t at, __mmask16 n) {
    if (at < 0) return _mm512_setzero_si512();
    if constexpr (S == Storage::kBfloat16)
      return _mm512_cvtepu16_epi32(
          _mm256_maskz_loadu_epi16(n, static_cast<const bf16*>(x.data) + at));
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(load16_at<S>(x.data, at, n)));
  }
};

struct DotPairs {
  using Token = bf16;
  static constexpr int64_t kSpan = 32;

  static __m512i load(const bf16* x) { return _mm512_loadu_si512(x); }
  static __m512 multiply_add(__m512i a, __m512i b, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  template <Storage S>
  static __m512i row(const Operand& x, int64_t row, int64_t depth, int64_t n) {
    return Pairs::row<S>(x, row, depth, n);
  }
};

}  // namespace
}  // namespace kimi::cpu
