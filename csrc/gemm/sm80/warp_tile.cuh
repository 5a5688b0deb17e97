// SPDX-License-Identifier: MIT
// The warp's part of a block tile: from shared memory into registers, and the sums. The sums lie as
// mma.m16n8 leaves them, whatever T: c[4 (row tile kColTiles + col tile) + i], lane l: row
// 16 row tile + l / 4 + 8 (i / 2), column 8 col tile + 2 (l % 4) + i % 2.
//
//   16-bit  16 of the depth at a time: ldmatrix, mma.sync; each 16 x 16 of A and of B once
//   fp32    1 of the depth at a time: plain loads, fma: the sum is that of a loop over the depth
//
// Addresses: what changes with the lane is computed once for a tile of the ring; with a depth-major
// tile the step along the depth, with an outer-major one the step along the outer index, is an
// exclusive or (the swizzle), the other one a constant.
#pragma once

#include "device/math.cuh"
#include "device/mma.cuh"
#include "gemm/sm80/tile_layout.cuh"

namespace kimi::gemm::sm80 {

// kWarpRows x kWarpCols of sums. load() may run ahead of multiply() by one fragment.
template <class T, class A, class B, int kWarpRows, int kWarpCols>
class WarpTile {
 public:
  static constexpr int kStepDepth = 16, kUnroll = 2;
  static constexpr int kRowTiles = kWarpRows / 16, kColTiles = kWarpCols / 8;

  struct Fragment {
    uint32_t a[kRowTiles][4], b[kColTiles / 2][4];
  };

  // First row and column of the warp in the block tile.
  __device__ WarpTile(int row, int col) {
    const int in = lane_id() % 8, low = lane_id() / 8 % 2, high = lane_id() / 16;
    a_ = A::kDepthMajor ? A::offset(row + in + 8 * low, high)
                        : A::offset(in + 8 * high, row / 8 + low);
    b_ = B::kDepthMajor ? B::offset(col + in + 8 * high, low)
                        : B::offset(in + 8 * low, col / 8 + high);
  }

  __device__ void load(Fragment& f, const char* a, const char* b, int step) const {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) load_16x16<A>(f.a[i], a, a_, i, step);
#pragma unroll
    for (int j = 0; j < kColTiles / 2; ++j) load_16x16<B>(f.b[j], b, b_, j, step);
  }

  template <int kN>
  __device__ static void multiply(const Fragment& f, float (&c)[kN]) {
    static_assert(kN == 4 * kRowTiles * kColTiles);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < kColTiles; ++j) {
        // There and back again, so that neighbours share the part of B.
        const int jj = i % 2 == 0 ? j : kColTiles - 1 - j;
        const uint32_t (&both)[4] = f.b[jj / 2];
        const uint32_t b[2] = {both[jj % 2 * 2], both[jj % 2 * 2 + 1]};
        mma_m16n8k16<T>(reinterpret_cast<float (&)[4]>(c[4 * (i * kColTiles + jj)]), f.a[i], b);
      }
  }

 private:
  template <class L>
  __device__ static void load_16x16(uint32_t (&r)[4], const char* tile, int lane, int outer_step,
                                    int depth_step) {
    if constexpr (L::kDepthMajor)
      ldmatrix_x4(r, tile + (lane ^ depth_step * 32) + outer_step * 16 * L::kRowBytes);
    else
      ldmatrix_x4_transposed(r, tile + (lane ^ outer_step * 32) + depth_step * 16 * L::kRowBytes);
  }

  int a_, b_;  // byte offsets
};

template <class A, class B, int kWarpRows, int kWarpCols>
class WarpTile<float, A, B, kWarpRows, kWarpCols> {
 public:
  static constexpr int kStepDepth = 1, kUnroll = 2;
  static constexpr int kRowTiles = kWarpRows / 16, kColTiles = kWarpCols / 8;

  struct Fragment {
    float a[2 * kRowTiles], b[2 * kColTiles];
  };

  __device__ WarpTile(int row, int col)
      : a_(place<A>(row + lane_id() / 4)), b_(place<B>(col + lane_id() % 4 * 2)) {}

  __device__ void load(Fragment& f, const char* a, const char* b, int step) const {
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) f.a[i] = *at<A>(a, a_, 8 * i, step);
#pragma unroll
    for (int j = 0; j < kColTiles; ++j) {
      const float* const from = at<B>(b, b_, 8 * j, step);
      f.b[2 * j] = from[0];
      f.b[2 * j + 1] = from[B::kDepthMajor ? B::kRowBytes / 4 : 1];
    }
  }

  template <int kN>
  __device__ static void multiply(const Fragment& f, float (&c)[kN]) {
    static_assert(kN == 4 * kRowTiles * kColTiles);
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i)
#pragma unroll
      for (int j = 0; j < 2 * kColTiles; ++j) {
        float& sum = c[4 * (i / 2 * kColTiles + j / 2) + i % 2 * 2 + j % 2];
        sum = fma_rn(f.a[i], f.b[j], sum);
      }
  }

 private:
  // Of an outer index, at depth 0. The next one of an even index has the same key.
  template <class L>
  __device__ static int place(int outer) {
    return L::kDepthMajor ? L::offset(outer, 0) : L::offset(0, outer / 4) + outer % 4 * 4;
  }
  template <class L>
  __device__ static const float* at(const char* tile, int lane, int outer, int depth) {
    const int byte = L::kDepthMajor
                         ? (lane ^ depth / 4 * 16) + depth % 4 * 4 + outer * L::kRowBytes
                         : ((lane + outer * 4) ^ L::key(depth) * 16) + depth * L::kRowBytes;
    return reinterpret_cast<const float*>(tile + byte);
  }

  int a_, b_;
};

}  // namespace kimi::gemm::sm80
