// SPDX-License-Identifier: MIT
// Products with few tokens where depth is contiguous: vectors along depth, straight from memory,
// nothing is packed but the tokens; rows x tokens of sums in registers, in passes of up to
// D::kPassTokens tokens. One pass is bound by the memory that S lies in; several overlap it with
// products. A template over `D`:
//
//   F zero()                   a vector of sums        kRows[T - 1]   rows of S at a time beside T
//   Token, load(token)         a packed element, and                  tokens: many streams from
//   row<S>(s, row, depth, n)   kSpan of them from                     memory, and rows x tokens of
//                              either operand                         sums within the registers
//   multiply_add(w, v, sum)                            store_sums     the lanes of four sums
//   kHoldsRows                 whether rows may stay in registers in place of the tokens
//   kOnePass                   tokens beside which the rows of one pass are streams enough
//   kScales, add_scaled<S, T>  whether quantised rows are multiplied without their scales, which then
//     (s, row, depth, n,       come to the sums of 64 depths; a row's 64 depths by T tokens
//      x, stride, sums)
//
// Included by engine files only.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <type_traits>

#include "gemm/cpu/block.h"
#include "gemm/cpu/block_element.h"

namespace kimi::cpu {
namespace {  // every engine file has its own copy

// n <= O::kLanes depths of a row in values, zeros behind them. Not inlined into every tile.
template <class O>
__attribute__((noinline)) void read_elements(const Operand& x, int64_t row, int64_t depth,
                                             int64_t n, float* values) {
  for (int64_t i = 0; i < O::kLanes; ++i)
    values[i] = i < n ? read_element(x, row, depth + i) : 0.0f;
}

// row<S> of engines whose Token is float.
template <class O, Storage S>
typename O::F row_of(const Operand& x, int64_t row, int64_t depth, int64_t n) {
  if constexpr (S > Storage::kFloat16) {
    const int64_t at = row * x.row_stride + depth;  // kLanes depths share a scale
    const uint8_t* bytes = static_cast<const uint8_t*>(x.data);
    if (n == O::kLanes && S == Storage::kFp8Block)
      return O::mul(O::load_e4m3(bytes + at), O::set(fp8_scale(x, row, depth)));
    if (n == O::kLanes && S == Storage::kInt4Group)
      return O::mul(O::load_int4(bytes + at / 2), O::set(int4_scale(x, row, depth)));
    alignas(64) float values[O::kLanes];
    read_elements<O>(x, row, depth, n, values);
    return O::load(values);
  } else {
    using T = std::conditional_t<S == Storage::kFloat32, float,
                                 std::conditional_t<S == Storage::kBfloat16, bf16, fp16>>;
    return O::load(static_cast<const T*>(x.data) + row * x.row_stride + depth, int(n));
  }
}

template <class D, Storage S>
void pack_dot_rows(const Operand& x, int64_t row, int64_t rows, int64_t count, void* tokens) {
  using Token = typename D::Token;
  Token* to = static_cast<Token*>(tokens);
  const int64_t stride = round_up(count, 64);
  for (int64_t r = 0; r < rows; ++r, to += stride) {
    const int64_t source = gathered(x.row_index, x.index_divisor, row + r);
    for (int64_t d = 0; d < stride; d += D::kSpan) {
      const int64_t left = count - d;
      if (source >= 0 && left > 0 && x.depth_stride == 1 && !x.depth_index) {
        const auto v = D::template row<S>(x, source, d, left < D::kSpan ? left : D::kSpan);
        __builtin_memcpy(to + d, &v, sizeof v);
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

// Depths of a cache line.
constexpr int64_t depths_of_line(Storage s) {
  if (s == Storage::kInt4Group) return 128;
  return s == Storage::kFp8Block ? 64 : s == Storage::kFloat32 ? 16 : 32;
}

// Rows to fetch while others are multiplied; at depth `end` their lines go on `jump` bytes further.
struct RowsAhead {
  const char* first;
  int64_t stride;
  int64_t rows;  // 0: none
  int64_t end = -1, jump = 0;
};

// R rows of S by T tokens.
template <class D, Storage S, int R, int T>
void dot_tile(const typename D::Token* x, int64_t x_stride, const Operand& s, int64_t row,
              int64_t count, RowsAhead ahead, float* c, int64_t stride) {
  constexpr bool kScaled = D::kScales && S > Storage::kFloat16;
  constexpr int64_t kSpan = kScaled ? 64 : D::kSpan;
  constexpr int64_t kLine = std::max(kSpan, depths_of_line(S));
  typename D::F sum[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[r][t] = D::zero();
  // Tokens stay in registers beside the sums and rows pass by, or the other way where rows are fewer.
  constexpr bool kFewRows = D::kHoldsRows && R < T;
  constexpr int kFew = kFewRows ? R : T, kMany = kFewRows ? T : R;
  using Vector = decltype(D::load(x));
  const auto step = [&](int64_t d, int64_t n) {
    if constexpr (kScaled) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        D::template add_scaled<S, T>(s, row + r, d, n, x + d, x_stride, sum[r]);
    } else {
      Vector v[kFew];
#pragma GCC unroll 8
      for (int i = 0; i < kFew; ++i)
        v[i] = kFewRows ? D::template row<S>(s, row + i, d, n) : D::load(x + i * x_stride + d);
#pragma GCC unroll 8
      for (int i = 0; i < kMany; ++i) {
        const Vector w =
            kFewRows ? D::load(x + i * x_stride + d) : D::template row<S>(s, row + i, d, n);
#pragma GCC unroll 8
        for (int j = 0; j < kFew; ++j) {
          auto& to = kFewRows ? sum[j][i] : sum[i][j];
          to = kFewRows ? D::multiply_add(v[j], w, to) : D::multiply_add(w, v[j], to);
        }
      }
    }
  };
  int64_t d = 0;
  for (; d + kLine <= count; d += kLine, ahead.first += 64) {
    if (d == ahead.end) ahead.first += ahead.jump;
    for (int64_t i = 0; i < ahead.rows; ++i)
      __builtin_prefetch(ahead.first + i * ahead.stride, 0, 2);  // the L2 cache
#pragma GCC unroll 1  // steps mixed with each other would need more registers than there are
    for (int64_t i = 0; i < kLine; i += kSpan) step(d + i, kSpan);
  }
  for (; d < count; d += kSpan) step(d, std::min(kSpan, count - d));
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 2
    for (int r = 0; r < R; r += 4)
      D::store_sums(c + t * stride + r, R - r, sum[r][t], r + 1 < R ? sum[r + 1][t] : D::zero(),
                    r + 2 < R ? sum[r + 2][t] : D::zero(), r + 3 < R ? sum[r + 3][t] : D::zero());
}

// All rows by `passes` passes of T tokens, the last ones of T - 1. The first pass over a block of
// rows waits for memory; the later ones find them in the cache and fetch the next block.
template <class D, Storage S, int T>
void dot_tokens(const typename D::Token* x, int64_t num_tokens, int64_t passes, const Operand& s,
                int64_t row, int64_t rows, int64_t count, float* c, int64_t stride) {
  constexpr int kRows = D::kRows[T - 1];
  const int64_t x_stride = round_up(count, 64);
  const int64_t smaller = passes * T - num_tokens;
  constexpr int64_t kDepths = depths_of_line(S), kAhead = 1024;  // bytes
  const int64_t row_bytes = s.row_stride * 64 / kDepths;
  const int64_t last_line = std::max<int64_t>(0, ceil_div(count, kDepths) - kAhead / 64);
  const int64_t each = passes > 1 ? (kRows + passes - 2) / (passes - 1) : 0;  // rows to fetch
  const auto block = [&]<int R>(std::integral_constant<int, R>, int64_t j) {
    const typename D::Token* from = x;
    float* to = c + j;
    for (int64_t pass = 0; pass < passes; ++pass) {
      const int64_t done = (pass - 1) * each, left = std::min<int64_t>(R, rows - j - R) - done;
      RowsAhead ahead = {static_cast<const char*>(s.data) + (row + j + R + done) * row_bytes,
                         row_bytes, 0};
      if (pass > 0) ahead.rows = std::clamp<int64_t>(left, 0, each);
      if (pass == 0) {
        ahead = {static_cast<const char*>(s.data) + (row + j) * row_bytes + kAhead, row_bytes, R};
        if (passes == 1) {  // nobody else fetches the beginnings of the next rows
          ahead.end = last_line * kDepths;
          ahead.jump = R * row_bytes - last_line * 64 - kAhead;
        }
      }
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

template <class D, int T = D::kPassTokens>
void dot(const void* tokens, int64_t num_tokens, const Operand& s, int64_t row, int64_t rows,
         int64_t count, float* c, int64_t stride) {
  const int64_t passes =
      num_tokens <= D::kOnePass ? 1 : std::max<int64_t>(2, ceil_div(num_tokens, D::kPassTokens));
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
