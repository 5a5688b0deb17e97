// SPDX-License-Identifier: MIT
// Symmetric matrices in shared memory, as the tiles of their lower triangles, and their products.
//
//   0        tile (i, j), j <= i, is number i (i + 1) / 2 + j: 32 x 32 of 16 bits or 16 x 16 of
//   1 2      fp32, in rows of 64 bytes. A tile on the diagonal has both of its halves. What lies
//   3 4 5    above is read as the mirror image of what lies below: ldmatrix turns it.
//
//   (A B)(i, j) = sum over k of   k <= j        A(i, k)  B(j, k)
//                                 j < k <= i    A(i, k)  B(k, j) turned
//                                 i < k         A(k, i) turned  B(k, j) turned
//
// A warp has the sums of a tile, by mma.sync or, in fp32, by fma. Nothing is split over the depth.
#pragma once

#include "device/math.cuh"
#include "device/vec.cuh"
#include "gemm/sm80/warp_tile.cuh"

namespace kimi::newton_schulz_cuda {

template <class T>
struct Triangles {
  static constexpr int kTile = sizeof(T) == 2 ? 32 : 16;
  static constexpr int kTileBytes = kTile * 64, kSums = kTile * kTile / kWarpSize;

  using Straight = gemm::sm80::TileLayout<T, Major::kDepth, kTile, kTile>;
  using Turned = gemm::sm80::TileLayout<T, Major::kOuter, kTile, kTile>;
  template <class A, class B, int kCols = kTile>
  using Warp = gemm::sm80::WarpTile<T, A, B, kTile, kCols>;

  // Bytes of `tiles` rows of tiles, and so where the next one begins.
  KIMI_HOST_DEVICE static constexpr int bytes(int tiles) {
    return tiles * (tiles + 1) / 2 * kTileBytes;
  }
  __device__ static int at(int i, int j) { return bytes(i) + j * kTileBytes; }

  // sums += A B by what `warp` reads, `depth` deep.
  template <class W, int kN>
  __device__ static void accumulate(const W& warp, const char* a, const char* b, int depth,
                                    float (&sums)[kN]) {
    typename W::Fragment f;
#pragma unroll 2
    for (int step = 0; step < depth / W::kStepDepth; ++step) {
      warp.load(f, a, b, step);
      W::multiply(f, sums);
    }
  }

  // sums += row i of tiles of A times B, of which `b(k)` is what multiplies tile k.
  template <class LayoutOfB, int kCols, class B, int kN>
  __device__ static void accumulate_row(const char* a, int i, int tiles, int col, const B& b,
                                        float (&sums)[kN]) {
    const Warp<Straight, LayoutOfB, kCols> straight(0, col);
    int k = 0;
#pragma unroll 1
    for (; k <= i; ++k) accumulate(straight, a + at(i, k), b(k), kTile, sums);
    const Warp<Turned, LayoutOfB, kCols> turned(0, col);
#pragma unroll 1
    for (; k < tiles; ++k) accumulate(turned, a + at(k, i), b(k), kTile, sums);
  }

  // sums += tile (i, j) of A B, j <= i.
  __device__ static void accumulate_tile(const char* a, const char* b, int i, int j, int tiles,
                                         float (&sums)[kSums]) {
    int k = 0;
    const Warp<Straight, Straight> low(0, 0);
#pragma unroll 1
    for (; k <= j; ++k) accumulate(low, a + at(i, k), b + at(j, k), kTile, sums);
    const Warp<Straight, Turned> middle(0, 0);
#pragma unroll 1
    for (; k <= i; ++k) accumulate(middle, a + at(i, k), b + at(k, j), kTile, sums);
    const Warp<Turned, Turned> high(0, 0);
#pragma unroll 1
    for (; k < tiles; ++k) accumulate(high, a + at(k, i), b + at(k, j), kTile, sums);
  }

  // visit(i, row, col) for the pairs of sums, 2 i and 2 i + 1, that a lane has of a tile or, side by
  // side, of kCols columns, as mma.m16n8 leaves them.
  template <int kCols = kTile, class Visitor>
  __device__ static void each_pair(const Visitor& visit) {
#pragma unroll
    for (int i = 0; i < kTile * kCols / kWarpSize / 2; ++i) {
      const int rows = i / 2 / (kCols / 8), cols = i / 2 % (kCols / 8);
      visit(i, 16 * rows + 8 * (i % 2) + lane_id() / 4, 8 * cols + lane_id() % 4 * 2);
    }
  }
  // Two neighbours of a row, rounded.
  __device__ static void store(T* to, float first, float second) {
    Vec<T, 2> both;
    if constexpr (sizeof(T) == 2) {
      const uint32_t pair = round_pair<T>(first, second);
      memcpy(&both, &pair, sizeof both);
    } else {
      both[0] = first;
      both[1] = second;
    }
    *reinterpret_cast<Vec<T, 2>*>(to) = both;
  }
  template <class Layout>
  __device__ static T* element(char* tile, int row, int col) {
    constexpr int kPer = Layout::kPerChunk;
    return reinterpret_cast<T*>(tile + Layout::offset(row, col / kPer)) + col % kPer;
  }
  template <class Layout>
  __device__ static const T* element(const char* tile, int row, int col) {
    return element<Layout>(const_cast<char*>(tile), row, col);
  }

  // A tile of D = alpha sums + beta C + delta I. Of one on the diagonal the lower half counts, and
  // becomes the upper one. An element of C is read by the thread that writes it in D, which may be C.
  struct Affine {
    float alpha, beta, delta;
  };
  __device__ static void store(const float (&sums)[kSums], const Affine& f, const char* c, char* d,
                               bool diagonal) {
    each_pair([&](int i, int row, int col) {
      float v[2] = {mul_rn(f.alpha, sums[2 * i]), mul_rn(f.alpha, sums[2 * i + 1])};
      if (f.beta != 0.0f) {
        const auto old = *reinterpret_cast<const Vec<T, 2>*>(element<Straight>(c, row, col));
        v[0] = fma_rn(f.beta, to_float(old[0]), v[0]);
        v[1] = fma_rn(f.beta, to_float(old[1]), v[1]);
      }
      if (i / 2 % (kTile / 8) == 2 * (i / 2 / (kTile / 8)) + i % 2) {  // 8 x 8 on the diagonal
        if (diagonal && col == row) v[0] = add_rn(v[0], f.delta);
        if (diagonal && col + 1 == row) v[1] = add_rn(v[1], f.delta);
      }
      store(element<Straight>(d, row, col), v[0], v[1]);
    });
    if (!diagonal) return;
    warp_barrier();
    const int row = lane_id() % kTile;
#pragma unroll 1
    for (int i = 1; i < kTile; ++i)
      if (const int col = row ^ i; col < row && lane_id() < kTile)
        *element<Straight>(d, col, row) = *element<Straight>(d, row, col);
  }
};

}  // namespace kimi::newton_schulz_cuda
