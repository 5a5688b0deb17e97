// SPDX-License-Identifier: MIT
// Products with few tokens on AVX-512: each row of S is read once, straight from memory, vectors
// along depth; several rows x T tokens of sums in registers. Bound by the memory that S lies in.
// Included by the ISA files only.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "cpu/gemm.h"
#include "cpu/gemm_pack_avx512.h"

namespace kimi::cpu {
namespace {  // every ISA file has its own copy

constexpr int64_t kDotTokens = 4;
// Rows of S at a time: many streams from memory, and rows x tokens of sums within 32 registers.
constexpr int dot_rows(int tokens) { return tokens <= 3 ? 8 : 6; }

template <class D, Storage S>
void pack_dot_rows(const Operand& x, int64_t row, int64_t rows, int64_t count, void* tokens) {
  using Token = typename D::Token;
  Token* to = static_cast<Token*>(tokens);
  const int64_t stride = BlockEngine::round_up(count, 64);
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

template <class D, Storage S, int R, int T>
void dot_tile(const typename D::Token* x, int64_t x_stride, const Operand& s, int64_t row,
              int64_t count, float* c, int64_t stride) {
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
  for (; d + D::kSpan <= count; d += D::kSpan) step(d, D::kSpan);
  if (d < count) step(d, count - d);
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) c[t * stride + r] = _mm512_reduce_add_ps(sum[r][t]);
}

template <class D, Storage S, int T>
void dot_tokens(const typename D::Token* x, const Operand& s, int64_t row, int64_t rows,
                int64_t count, float* c, int64_t stride) {
  const int64_t x_stride = BlockEngine::round_up(count, 64);
  constexpr int kRows = dot_rows(T);
  int64_t j = 0;
  for (; j + kRows <= rows; j += kRows)
    dot_tile<D, S, kRows, T>(x, x_stride, s, row + j, count, c + j, stride);
  for (; j < rows; ++j) dot_tile<D, S, 1, T>(x, x_stride, s, row + j, count, c + j, stride);
}

template <class D, int T = kDotTokens>
void dot(const void* tokens, int64_t num_tokens, const Operand& s, int64_t row, int64_t rows,
         int64_t count, float* c, int64_t stride) {
  if constexpr (T > 1)
    if (num_tokens < T) return dot<D, T - 1>(tokens, num_tokens, s, row, rows, count, c, stride);
  dispatch_storage(s.storage, [&]<Storage S>() {
    dot_tokens<D, S, T>(static_cast<const typename D::Token*>(tokens), s, row, rows, count, c,
                        stride);
  });
}

}  // namespace
}  // namespace kimi::cpu
