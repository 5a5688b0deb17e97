// SPDX-License-Identifier: MIT
// What happens to each element before and after the products: the norm, X = G / norm, and the way
// out. A warp takes 32 x 64 elements of the m x n form, a lane 8 x 8 of them:
//
//   lane l: rows 8 (l / 8) ..., columns 8 (l % 8) ...; memory is read and written in runs of 8
//
// The squares of a lane's elements are added row after row in fp64, where products of two fp32 are
// exact and nothing overflows: one pass, and 2^k G gives 2^2k times the sum to the bit. Which lane
// adds what depends on m and n alone, so that a tall matrix has the norm of its transpose.
#pragma once

#include <cmath>

#include "common/integer.h"
#include "device/math.cuh"
#include "device/vec.cuh"
#include "device/warp.cuh"
#include "newton_schulz/cuda.h"

namespace kimi::newton_schulz_cuda {

// 4 x 4 elements or what there is of them, perhaps nothing.
struct Block {
  int64_t row, col;
  int rows, cols;
};
using Values = float[4][4];

__device__ inline int up_to_4(int64_t left) {
  return left <= 0 ? 0 : left < 4 ? static_cast<int>(left) : 4;
}

// body(block) for the tiles first, first + 1, ... of a rows x cols matrix, shared by `warps` warps.
// All lanes come to it.
template <class Body>
__device__ inline void for_each_block(int64_t rows, int64_t cols, int64_t first, int64_t last,
                                      int warps, const Body& body) {
  const int64_t across = ceil_div(cols, kTileCols);
#pragma unroll 2
  for (int64_t tile = first + warp_id(); tile < last; tile += warps) {
    Block b;
    b.row = tile / across * kTileRows + lane_id() / 8 * 4;
    b.col = tile % across * kTileCols + lane_id() % 8 * 4;
    b.rows = up_to_4(rows - b.row);
    b.cols = up_to_4(cols - b.col);
    body(b);
  }
}

__device__ inline void transpose(Values& v) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < i; ++j) {
      const float upper = v[j][i];
      v[j][i] = v[i][j];
      v[i][j] = upper;
    }
}

// A run of 4 as fp32, zero beyond `count`. `wide`: 16 bytes divide the address of four fp32, 8 that
// of four narrower ones.
template <class T>
__device__ inline void load4(const T* from, float (&v)[4], int count, bool wide) {
  if (wide && count == 4) {
    const auto run = *reinterpret_cast<const Vec<T, 4>*>(from);
#pragma unroll
    for (int i = 0; i < 4; ++i) v[i] = to_float(run[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) v[i] = i < count ? to_float(from[i]) : 0.0f;
}
template <class T>
__device__ inline void store4(T* to, const float (&v)[4], int count, bool wide) {
  Vec<T, 4> run;
  if constexpr (sizeof(T) == 2) {
    const uint32_t pairs[2] = {round_pair<T>(v[0], v[1]), round_pair<T>(v[2], v[3])};
    memcpy(&run, pairs, sizeof run);
  } else {
    memcpy(&run, v, sizeof run);
  }
  if (wide && count == 4) {
    *reinterpret_cast<Vec<T, 4>*>(to) = run;
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (i < count) to[i] = run[i];
}

// visit(pointer of the right type to the block's first element)
template <class Visitor>
__device__ inline void at_block(const void* matrix, const Lines& at, const Block& b,
                                const Visitor& visit) {
  const int64_t first = at.across ? b.col * at.stride + b.row : b.row * at.stride + b.col;
  if (at.dtype == KIMI_FLOAT32)
    visit(static_cast<const float*>(matrix) + first);
  else if (at.dtype == KIMI_BFLOAT16)
    visit(static_cast<const bf16*>(matrix) + first);
  else
    visit(static_cast<const fp16*>(matrix) + first);
}

// Zero beyond the block.
__device__ inline void load_block(const void* matrix, const Lines& at, const Block& b, Values& v) {
  const int lines = at.across ? b.cols : b.rows, length = at.across ? b.rows : b.cols;
  at_block(matrix, at, b, [&]<class T>(const T* from) {
#pragma unroll
    for (int l = 0; l < 4; ++l)
      load4(from + l * at.stride, v[l], l < lines ? length : 0, at.wide != 0);
  });
  if (at.across) transpose(v);
}

__device__ inline void store_block(void* matrix, const Lines& at, const Block& b, Values& v) {
  const int lines = at.across ? b.cols : b.rows, length = at.across ? b.rows : b.cols;
  if (at.across) transpose(v);
  at_block(matrix, at, b, [&]<class T>(const T* to) {
#pragma unroll
    for (int l = 0; l < 4; ++l)
      store4(const_cast<T*>(to) + l * at.stride, v[l], l < lines ? length : 0, at.wide != 0);
  });
}

__device__ inline double warp_sum(double sum) {
#pragma unroll
  for (int half = 16; half > 0; half /= 2) sum += warp_exchange(sum, half);
  return sum;
}

// Of a warp's tiles from `first` to `last`; every lane has it.
__device__ inline double sum_of_squares(const void* g, const Lines& at, int64_t m, int64_t n,
                                        int64_t first, int64_t last, int warps) {
  double sum = 0.0;
  for_each_block(m, n, first, last, warps, [&](const Block& b) {
    Values v;
    load_block(g, at, b, v);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sum += double{v[i][j]} * double{v[i][j]};  // exact: fma or not
  });
  return warp_sum(sum);
}

__device__ inline float power_of_two(int exponent) {
  return float_of(static_cast<uint32_t>(127 + exponent) << 23);
}

// What X is kept larger by, taken back.
__device__ inline void undo_shift(Values& v, int shift) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) v[i][j] = mul_rn(v[i][j], power_of_two(-shift));
}

// x = (g scale) / divisor, 2^shift times the quotient of g and its norm. `scale` is a power of two
// that keeps both of them in range; a norm that is zero or not finite stays as it is.
struct Unit {
  float scale, divisor;

  __device__ Unit(double squares, float eps, int shift) {
    double norm = sqrt(squares);
    if (norm < double{eps}) norm = double{eps};
    int exponent = 0;
    if (norm > 0.0 && norm <= 0x1p200) exponent = ilogb(norm) + 1;
    exponent = exponent < -126 ? -126 : exponent > 126 ? 126 : exponent;
    scale = power_of_two(-exponent);
    if (norm == 0.0) norm = 1.0;
    divisor = mul_rn(static_cast<float>(norm * double{scale}), power_of_two(-shift));
  }
  __device__ void apply(Values& v) const {
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) v[i][j] = div_rn(mul_rn(v[i][j], scale), divisor);
  }
};

}  // namespace kimi::newton_schulz_cuda
