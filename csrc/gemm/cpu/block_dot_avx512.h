// SPDX-License-Identifier: MIT
// Products with few tokens on AVX-512: vectors along depth, straight from memory, nothing is packed
// but the tokens; rows x tokens of sums in registers, in passes of up to kPassTokens tokens. One
// pass is bound by the memory that S lies in; several overlap it with products. Beyond kDotTokens
// packed strips are as fast (measured on Zen 4). Included by the ISA files only.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include <algorithm>
#include <type_traits>

#include "gemm/cpu/block.h"
#include "gemm/cpu/block_pack_avx512.h"

namespace kimi::cpu {
namespace {  // every ISA file has its own copy

constexpr int64_t kPassTokens = 6, kDotTokens = 20;
// Rows of S at a time: many streams from memory, and rows x tokens of sums within 32 registers.
constexpr int dot_rows(int tokens) { return tokens <= 3 ? 8 : tokens == 4 ? 6 : 4; }

template <class D, Storage S>
void pack_dot_rows(const Operand& x, int64_t row, int64_t rows, int64_t count, void* tokens) {
  using Token = typename D::Token;
  Token* to = static_cast<Token*>(tokens);
  const int64_t stride = round_up(count, 64);
  for (int64_t r = 0; r < rows; ++r, to += stride) {
    const int64_t source = gathered(x.row_index, x.index_divisor, row + r);
    for (int64_t d = 0; d < stride; d += D::kSpan) {
      const int64_t left = count - d;
      if (source >= 0 && left > 0 && along_rows(x)) {
        const auto v = D::template row<S>(x, source, d, left < D::kSpan ? left : D::kSpan);
        __builtin_memcpy(to + d, &v, 64);
      } else {
        for (int64_t i = 0; i < D::kSpan; ++i)
          to[d + i] =
              from_float<Token>(source >= 0 && i < left ? read_element(x, row + r, d + i) : 0.0f);
      }
    }
  }
}

template <class D>
void pack_dot(const Operand& x, int64_t row, int64_t rows, int64_t count, void* tokens) {
  dispatch_storage(x.storage,
                   [&]<Storage S>() { pack_dot_rows<D, S>(x, row, rows, count, tokens); });
}

// Four sums of all lanes.
inline __m128 sum_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d ab64 = _mm512_castps_pd(ab), cd64 = _mm512_castps_pd(cd);
  const __m512 quarters = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab64, cd64)),
                                        _mm512_castpd_ps(_mm512_unpackhi_pd(ab64, cd64)));
  const __m256 halves =
      _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
}

// Rows to fetch while others are multiplied.
struct RowsAhead {
  const char* first;
  int64_t stride;
  int64_t rows;  // 0: none
};

// R rows of S by T tokens.
template <class D, Storage S, int R, int T>
void dot_tile(const typename D::Token* x, int64_t x_stride, const Operand& s, int64_t row,
              int64_t count, RowsAhead ahead, float* c, int64_t stride) {
  __m512 sum[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[r][t] = _mm512_setzero_ps();
  const auto step = [&](int64_t d, int64_t n) {
    decltype(D::load(x)) v[T];
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) v[t] = D::load(x + t * x_stride + d);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const auto w = D::template row<S>(s, row + r, d, n);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) sum[r][t] = D::multiply_add(w, v[t], sum[r][t]);
    }
  };
  int64_t d = 0;
  for (; d + D::kSpan <= count; d += D::kSpan, ahead.first += 64) {
    for (int64_t i = 0; i < ahead.rows; ++i)
      _mm_prefetch(ahead.first + i * ahead.stride, _MM_HINT_T1);
    step(d, D::kSpan);
  }
  if (d < count) step(d, count - d);
  const __m512 none = _mm512_setzero_ps();
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int r = 0; r < R; r += 4) {
      const __m128 sums =
          sum_lanes(sum[r][t], r + 1 < R ? sum[r + 1][t] : none, r + 2 < R ? sum[r + 2][t] : none,
                    r + 3 < R ? sum[r + 3][t] : none);
      _mm_mask_storeu_ps(c + t * stride + r, R - r >= 4 ? 0xf : (1 << (R - r)) - 1, sums);
    }
}

// All rows by `passes` passes of T tokens, the last ones of T - 1. The first pass over a block of
// rows waits for memory; the later ones find them in the cache and fetch the next block.
template <class D, Storage S, int T>
void dot_tokens(const typename D::Token* x, int64_t num_tokens, int64_t passes, const Operand& s,
                int64_t row, int64_t rows, int64_t count, float* c, int64_t stride) {
  constexpr int kRows = dot_rows(T);
  const int64_t x_stride = round_up(count, 64);
  const int64_t smaller = passes * T - num_tokens;
  const int64_t row_bytes = s.row_stride * (S == Storage::kFloat32 ? 4 : 2);
  const int64_t each = passes > 1 ? (kRows + passes - 2) / (passes - 1) : 0;  // rows to fetch
  const auto block = [&]<int R>(std::integral_constant<int, R>, int64_t j) {
    const typename D::Token* from = x;
    float* to = c + j;
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t done = (pass - 1) * each, left = std::min<int64_t>(R, rows - j - R) - done;
      RowsAhead ahead = {static_cast<const char*>(s.data) + (row + j + R + done) * row_bytes,
                         row_bytes, 0};
      if (S <= Storage::kFloat16 && pass > 0) ahead.rows = std::clamp<int64_t>(left, 0, each);
      if (S <= Storage::kFloat16 && pass == 0)
        ahead = {static_cast<const char*>(s.data) + (row + j) * row_bytes + 1024, row_bytes, R};
      if (pass < passes - smaller) {
        dot_tile<D, S, R, T>(from, x_stride, s, row + j, count, ahead, to, stride);
        from += T * x_stride;
        to += T * stride;
      } else if constexpr (T > 1) {
        dot_tile<D, S, R, T - 1>(from, x_stride, s, row + j, count, ahead, to, stride);
        from += (T - 1) * x_stride;
        to += (T - 1) * stride;
      }
    }
  };
  int64_t j = 0;
  for (; j + kRows <= rows; j += kRows) block(std::integral_constant<int, kRows>{}, j);
  for (; j < rows; ++j) block(std::integral_constant<int, 1>{}, j);
}

template <class D, int T = kPassTokens>
void dot(const void* tokens, int64_t num_tokens, const Operand& s, int64_t row, int64_t rows,
         int64_t count, float* c, int64_t stride) {
  const int64_t passes = (num_tokens + kPassTokens - 1) / kPassTokens;
  if constexpr (T > 1)
    if ((num_tokens + passes - 1) / passes < T)
      return dot<D, T - 1>(tokens, num_tokens, s, row, rows, count, c, stride);
  dispatch_storage(s.storage, [&]<Storage S>() {
    dot_tokens<D, S, T>(static_cast<const typename D::Token*>(tokens), num_tokens, passes, s, row,
                        rows, count, c, stride);
  });
}

}  // namespace
}  // namespace kimi::cpu
