// SPDX-License-Identifier: MIT
// Products with few tokens where the rows of S are contiguous: kDepths depths at a time are read
// as streams, straight from memory, times the tokens' elements at these depths.
//
//             j ->
//   S  d     [ w ][ w ][   ...   ]      c[t, j..] += sum over kDepths of x[t, d] w
//      d+1   [ w ][ w ][   ...   ]      c stays in the cache; a vector of S serves up to
//      ...                              kPass tokens
//
// Sums of kDepths depths are added in ascending order, products in fp32. A template over `O`: F,
// kLanes, set, add, fma, load and store of cpu/vec_*.h. Included by engine files only.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <type_traits>

#include "gemm/cpu/block.h"

namespace kimi::cpu {
namespace {  // every engine file has its own copy

constexpr int64_t kDepths = 8;

// kDepth depths of `rows` rows by M tokens; `next`: as many elements further the next depths begin.
template <class O, int M, int kDepth, class Token, class T>
void spread_tile(const Token* x, int64_t x_stride, const T* s, int64_t s_stride, int64_t rows,
                 int64_t next, bool accumulate, float* c, int64_t stride) {
  using F = typename O::F;
  constexpr int64_t kAhead = 1024 / sizeof(T);
  float factor[kDepth][M];
  for (int k = 0; k < kDepth; ++k)
    for (int t = 0; t < M; ++t) factor[k][t] = to_float(x[t * x_stride + k]);
  // V whole vectors, or one of `left` lanes.
  const auto step = [&]<int V>(std::integral_constant<int, V>, int64_t j, int left) {
    F sum[M][V];
#pragma GCC unroll 8
    for (int t = 0; t < M; ++t)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[t][v] = O::set(0.0f);
    const int64_t ahead = j + kAhead < rows ? kAhead : kAhead - rows + next;
#pragma GCC unroll 8
    for (int k = 0; k < kDepth; ++k) {
      const T* from = s + k * s_stride + j;
      for (int64_t line = 0; line < int64_t(V * O::kLanes * sizeof(T)); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(from + ahead) + line, 0, 2);
      F w[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v)
        w[v] = V > 1 ? O::load(from + v * O::kLanes) : O::load(from, left);
#pragma GCC unroll 8
      for (int t = 0; t < M; ++t) {
        const F f = O::set(factor[k][t]);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[t][v] = O::fma(w[v], f, sum[t][v]);
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < M; ++t)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        float* to = c + t * stride + j + v * O::kLanes;
        const int lanes = V > 1 ? O::kLanes : left;
        O::store(to, accumulate ? O::add(O::load(to, lanes), sum[t][v]) : sum[t][v], lanes);
      }
  };
  int64_t j = 0;
  for (; j + 2 * O::kLanes <= rows; j += 2 * O::kLanes)
    step(std::integral_constant<int, 2>{}, j, O::kLanes);
  for (; j < rows; j += O::kLanes)
    step(std::integral_constant<int, 1>{}, j, int(std::min<int64_t>(O::kLanes, rows - j)));
}

template <class O, int kPass, int kDepth, int M, class Token, class T>
void spread_tokens(const Token* x, int64_t x_stride, int64_t tokens, const T* s, int64_t s_stride,
                   int64_t rows, bool accumulate, float* c, int64_t stride) {
  if constexpr (M > 1)
    if (tokens < M)
      return spread_tokens<O, kPass, kDepth, M - 1>(x, x_stride, tokens, s, s_stride, rows,
                                                    accumulate, c, stride);
  spread_tile<O, M, kDepth>(x, x_stride, s, s_stride, rows, kDepth * s_stride, accumulate, c,
                            stride);
  if constexpr (M == kPass)
    if (tokens > M)
      spread_tokens<O, kPass, kDepth, M>(x + M * x_stride, x_stride, tokens - M, s, s_stride, rows,
                                         accumulate, c + M * stride, stride);
}

// BlockEngine::spread; tokens as pack_dot leaves them.
template <class O, class Token, int kPass>
void spread(const void* tokens, int64_t num_tokens, const Operand& s, int64_t row, int64_t rows,
            int64_t count, float* c, int64_t stride) {
  const int64_t x_stride = round_up(count, 64);
  // Engines of bf16 pairs meet no other dtype.
  const kimi_dtype dtype = kDtype<Token> == KIMI_BFLOAT16 ? KIMI_BFLOAT16 : kimi_dtype(s.storage);
  dispatch(dtype, [&]<class T>() {
    if constexpr (kDtype<Token> == KIMI_BFLOAT16 && kDtype<T> != KIMI_BFLOAT16) return;
    const Token* x = static_cast<const Token*>(tokens);
    const T* from = static_cast<const T*>(s.data) + row;
    int64_t d = 0;
    for (; d + kDepths <= count; d += kDepths)
      spread_tokens<O, kPass, kDepths, kPass>(x + d, x_stride, num_tokens,
                                              from + d * s.depth_stride, s.depth_stride, rows,
                                              d > 0, c, stride);
    for (; d < count; ++d)
      spread_tokens<O, kPass, 1, kPass>(x + d, x_stride, num_tokens, from + d * s.depth_stride,
                                        s.depth_stride, rows, d > 0, c, stride);
  });
}

}  // namespace
}  // namespace kimi::cpu
