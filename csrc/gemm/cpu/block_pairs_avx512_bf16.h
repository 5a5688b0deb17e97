// SPDX-License-Identifier: MIT
// Pairs of bf16 as the compute type of packing and of dot products; shared with the AMX engine.
#pragma once

#include "gemm/cpu/block_bytes_avx512_bf16.h"
#include "gemm/cpu/block_dot_avx512.h"
#include "gemm/cpu/block_pack_avx512.h"

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
    if constexpr (S == Storage::kFp8Block || S == Storage::kInt4Group)
      return scaled<S>(x, row, depth, n);
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
  // Two depths of 32 rows are two cache lines: interleaved into two vectors of pairs.
  template <Storage S, int64_t kWidth>
  static bool pack_columns(const Operand& x, int64_t row, int64_t rows, int64_t depth,
                           int64_t count, int64_t padded, uint32_t* to) {
    if (S != Storage::kBfloat16 || kWidth != 32 || rows < 32 || x.row_stride != 1 ||
        (x.depth_stride == 1 && !x.depth_index) || x.row_index)
      return false;
    const bf16* data = static_cast<const bf16*>(x.data) + row;
    const auto line = [&](int64_t d) {
      const int64_t at = d < count ? gathered(x.depth_index, x.index_divisor, depth + d) : -1;
      return at < 0 ? _mm512_setzero_si512() : _mm512_loadu_si512(data + at * x.depth_stride);
    };
    alignas(64) static constexpr uint16_t kFirst[32] = {0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,
                                                        37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
                                                        11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i first = _mm512_load_si512(kFirst);
    const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (int64_t d = 0; d < padded; d += 2, to += 32) {
      const __m512i even = line(d), odd = line(d + 1);
      _mm512_storeu_si512(to, _mm512_permutex2var_epi16(even, first, odd));
      _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi16(even, second, odd));
    }
    return true;
  }

 private:
  // n <= 32 depths, which share a scale.
  template <Storage S>
  static __m512i scaled(const Operand& x, int64_t row, int64_t depth, int64_t n) {
    const __m512i values = row64<S>(x, row, depth, n).first;
    const float by = S == Storage::kFp8Block ? fp8_scale(x, row, depth) : int4_scale(x, row, depth);
    const auto half = [&](__m256i words) {
      return _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16)),
                           _mm512_set1_ps(by));
    };
    const __m512i pairs = pair_of_vectors(half(_mm512_castsi512_si256(values)),
                                          half(_mm512_extracti64x4_epi64(values, 1)));
    return _mm512_maskz_mov_epi16(first32(n), pairs);
  }
  template <Storage S>
  static __m512i half(const Operand& x, int64_t at, __mmask16 n) {
    if (at == kZeros) return _mm512_setzero_si512();
    if constexpr (S == Storage::kBfloat16)
      return _mm512_cvtepu16_epi32(
          _mm256_maskz_loadu_epi16(n, static_cast<const bf16*>(x.data) + at));
    return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(load16_at<S>(x.data, at, n)));
  }
};

// Tables convert 64 depths in less time than six tokens are multiplied by them: up to here another
// pass is faster than packing (measured on Zen 4).
constexpr int64_t kDotQuantised = 16;

struct DotPairs : DotSums {
  using Token = bf16;
  static constexpr int64_t kSpan = 32;
  static constexpr bool kScales = true;

  static __m512i load(const bf16* x) { return _mm512_loadu_si512(x); }
  static __m512 multiply_add(__m512i a, __m512i b, __m512 sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  template <Storage S>
  static __m512i row(const Operand& x, int64_t row, int64_t depth, int64_t n) {
    return Pairs::row<S>(x, row, depth, n);
  }
  template <Storage S, int T>
  static void add_scaled(const Operand& s, int64_t row, int64_t depth, int64_t n, const bf16* x,
                         int64_t x_stride, __m512 sums[T]) {
    const Words w = row64<S>(s, row, depth, n);
    const __m512 zero = _mm512_setzero_ps();
    if constexpr (S == Storage::kFp8Block) {  // 64 depths never straddle a block
      const __m512 scale = _mm512_set1_ps(fp8_scale(s, row, depth));
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t, x += x_stride) {
        const __m512 sum =
            multiply_add(w.second, load(x + 32), multiply_add(w.first, load(x), zero));
        sums[t] = _mm512_fmadd_ps(sum, scale, sums[t]);
      }
    } else {
      const bf16* scale =
          static_cast<const bf16*>(s.scale) + row * s.scale_stride + depth / kInt4Group;
      uint32_t bits = 0;  // of two scales
      __builtin_memcpy(&bits, scale, n > 32 ? 4 : 2);
      const __m512i both = _mm512_set1_epi32(int(bits));
      const __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
      const __m512 second =
          _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000))));
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t, x += x_stride) {
        sums[t] = _mm512_fmadd_ps(multiply_add(w.first, load(x), zero), first, sums[t]);
        sums[t] = _mm512_fmadd_ps(multiply_add(w.second, load(x + 32), zero), second, sums[t]);
      }
    }
  }
};

}  // namespace
}  // namespace kimi::cpu
