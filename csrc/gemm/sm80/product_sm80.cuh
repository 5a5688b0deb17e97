// SPDX-License-Identifier: MIT
// The grouped product for every GPU from sm_80 on: mma.sync out of a ring of tiles that cp.async
// fills, on a grid that stays (schedule.cuh gives each block its next tile).
//
//   memory --cp.async--> ring of kStages tiles of A and B --ldmatrix--> registers --mma--> sums
//                        [ read ][ full ][ on its way ]          two fragments: one is multiplied
//                                                                while the next one is loaded
//   sums --> the ring's memory as fp32 --> epilogue.cuh --> rows
//
//   tile         threads                          a stage           ring           blocks on an SM
//   128 x 128    2 x 2 warps of 64 x 64 sums      64 B of depth     3 x 16 KB      2 (registers)
//    16 x 128    1 x 4 warps of 16 x 32 sums      128 B of depth    4 x 18 KB      2 on sm_80
//
// Cost of a stage of the large tile, 16-bit: 2^20 operations, 512 cycles of sm_80's tensor cores.
// It brings 16 KB (32 B a cycle, of 47 that the L2 of an A100 has for each SM) and moves 48 KB
// through shared memory (16 written, 32 read: 384 cycles). The loop issues 153 instructions a warp:
// 64 HMMA, 16 LDSM, 8 LDGSTS. A copy has the time of two stages, 2048 cycles while two blocks share
// the SM. *Predicted*, not measured: 75% of the peak of an A100 with groups of 512 rows and more;
// half of an H100's, where product_sm90 serves all but odd strides.
//
// The small tile waits for B: 64 KB of it on the way for each block. *Predicted*: 85% of memory
// bandwidth from two tiles a block on. fp32: 256 FFMA a thread to 48 loads from shared memory
// (depth-major; 32 outer-major); *predicted*: 70% of the peak without tensor cores.
#pragma once

#include <algorithm>
#include <utility>

#include "device/launch.cuh"
#include "gemm/affine.cuh"
#include "gemm/schedule.cuh"
#include "gemm/sm80/product_sm80.h"
#include "gemm/sm80/tile_loader.cuh"
#include "gemm/sm80/warp_tile.cuh"

namespace kimi::gemm::sm80 {

// kMajor: how tiles of B lie. A is depth-major unless K-grouped.
template <class T_, Grouping kGrouping, Major kMajor, class Policy_, int kTileRows_,
          Major kAMajor = kGrouping == Grouping::kK ? Major::kOuter : Major::kDepth>
struct ProductTraits {
  using T = T_;
  using Policy = Policy_;
  static constexpr bool kGated = Policy::kGated;
  static constexpr bool kOfM = kGrouping == Grouping::kM, kOfK = kGrouping == Grouping::kK;
  static constexpr int kThreads = 128;
  static constexpr int kTileRows = kTileRows_, kTileCols = 128;  // of the sums
  static constexpr int kOutCols = kGated ? kTileCols / 2 : kTileCols;
  static constexpr int kWarpsDown = kTileRows == 128 ? 2 : 1, kWarpsAcross = 4 / kWarpsDown;
  static constexpr int kWarpRows = kTileRows / kWarpsDown, kWarpCols = kTileCols / kWarpsAcross;
  static constexpr int kTileDepth = (kTileRows == 128 ? 64 : 128) / static_cast<int>(sizeof(T));
  static constexpr int kStages = kTileRows == 128 ? 3 : 4;
  static constexpr int kBlocks = 2;  // that share a multiprocessor, at least

  template <int kOuter, bool kIndexed, bool kGateAndUp>
  using ByOuter = OuterRows<T, kOuter, kTileDepth, kThreads, kIndexed, kGateAndUp>;
  template <int kOuter, bool kIndexed>
  using ByDepth = DepthRows<T, kOuter, kTileDepth, kThreads, kIndexed>;
  using LoadA = std::conditional_t<kAMajor == Major::kOuter, ByDepth<kTileRows, kOfK>,
                                   ByOuter<kTileRows, kOfM, false>>;
  using LoadB = std::conditional_t<kMajor == Major::kOuter, ByDepth<kTileCols, kOfK>,
                                   ByOuter<kTileCols, false, kGated>>;
  using A = typename LoadA::Layout;
  using B = typename LoadB::Layout;
  static constexpr int kStageBytes = A::kBytes + B::kBytes, kRingBytes = kStages * kStageBytes;

  using Warp = WarpTile<T, A, B, kWarpRows, kWarpCols>;
  static constexpr int kSums = kWarpRows * kWarpCols / kWarpSize;
  static constexpr int kChunk = kGated ? kWarpCols / 2 : kWarpCols;
  using Finisher = Finish<Policy, kChunk>;
  static_assert(4 * Finisher::kScratchFloats * static_cast<int>(sizeof(float)) <= kRingBytes);
  static_assert(!kGated || (kMajor == Major::kDepth && LoadB::kRowStep == kChunk));
};

// Sums `steps` tiles of the depth. The ring is free before and after.
template <class Traits, int kSums>
__device__ inline void sum_tiles(char* ring, int steps, typename Traits::LoadA& a,
                                 typename Traits::LoadB& b, const typename Traits::Warp& warp,
                                 float (&c)[kSums]) {
  constexpr int kStages = Traits::kStages, kLast = Traits::kRingBytes - Traits::kStageBytes;
  constexpr int kSteps = Traits::kTileDepth / Traits::Warp::kStepDepth;
  constexpr int kUnroll = std::min(kSteps, Traits::Warp::kUnroll);
  static_assert(kUnroll % 2 == 0 && kSteps % kUnroll == 0);
  const auto fill = [&](int slot, int step) {
    if (step < steps) {
      a.load(ring + slot, step);
      b.load(ring + slot + Traits::A::kBytes, step);
    }
    cp_async_commit();  // an empty group too: waits count groups
  };
#pragma unroll 1
  for (int s = 0; s < kStages; ++s) fill(s * Traits::kStageBytes, s);
  cp_async_wait<kStages - 1>();
  __syncthreads();
  typename Traits::Warp::Fragment f[2];
  warp.load(f[0], ring, ring + Traits::A::kBytes, 0);
  int slot = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
#pragma unroll 1
    for (int k = 0; k < kSteps; k += kUnroll) {
#pragma unroll
      for (int i = 0; i < kUnroll; ++i) {
        const bool last = i + 1 == kUnroll && k + kUnroll == kSteps;
        if (last) {  // the next tile has come; all warps have read this one: it is filled anew
          cp_async_wait<kStages - 2>();
          __syncthreads();
          fill(slot, step + kStages);
          slot = slot == kLast ? 0 : slot + Traits::kStageBytes;
        }
        const char* const tile = ring + slot;
        warp.load(f[(i + 1) % 2], tile, tile + Traits::A::kBytes, last ? 0 : k + i + 1);
        Traits::Warp::multiply(f[i % 2], c);
      }
    }
  }
  __syncthreads();  // the loop reads one fragment too many
}

// 16 rows after 16 rows of the warp's sums. One copy of the epilogue serves them all: only the way
// from the registers, whose numbers are fixed, is written out.
template <class Traits, int kSums>
__device__ inline void finish_rows(const typename Traits::Policy::Params& params, const Product& p,
                                   int32_t group, int64_t row, int valid, int64_t col,
                                   const float (&c)[kSums], float* scratch) {
  constexpr int kPerTile = 4 * Traits::Warp::kColTiles;
#pragma unroll 1
  for (int tile = 0; tile < Traits::Warp::kRowTiles && 16 * tile < valid; ++tile) {
    [&]<int... kTile>(std::integer_sequence<int, kTile...>) {
      ((tile == kTile
            ? Traits::Finisher::template collect<kTile * kPerTile, kTile * kPerTile + kPerTile / 2>(
                  c, scratch)
            : void()),
       ...);
    }(std::make_integer_sequence<int, Traits::Warp::kRowTiles>());
    Traits::Finisher::write(params, p, Rows{group, row + 16 * tile, valid - 16 * tile}, col,
                            scratch);
  }
}

__device__ inline uint32_t tiles_of(int64_t extent, int tile) {
  return static_cast<uint32_t>((extent + tile - 1) / tile);
}

// The tiles that fall to this block.
template <class Traits, class Visitor>
__device__ inline void for_each_tile(const Product& p, const Visitor& visit) {
  const uint32_t col_tiles = tiles_of(p.cols, Traits::kOutCols);
  Tile tile;
  if constexpr (!Traits::kOfM) {
    const MatrixSchedule schedule(
        p, tiles_of(p.rows, Traits::kTileRows), col_tiles,
        !Traits::kOfK && p.lower ? Traits::kTileCols / Traits::kTileRows : 0);
#pragma unroll 1
    for (uint32_t i = blockIdx.x; schedule.find(i, tile); i += gridDim.x) visit(tile);
  } else {
    using Schedule = RowSchedule<Traits::kTileRows>;
    typename Schedule::Place place;  // the schedule itself would take registers from the sums
#pragma unroll 1
    for (uint32_t i = blockIdx.x;; i += gridDim.x) {
      Schedule schedule(p.groups, col_tiles, Traits::Policy::kWritesZeros, place);
      if (!schedule.find(i, tile)) return;
      place = schedule.place();
      visit(tile);
    }
  }
}

__device__ inline int at_most(int64_t x, int limit) {
  return x < limit ? static_cast<int>(x) : limit;
}

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, Traits::kBlocks)
    product_kernel(const __grid_constant__ Job job,
                   const __grid_constant__ typename Traits::Policy::Params params) {
  KIMI_SHARED(char, ring);
  const Product& product = job.product;
  const int down = warp_id() / Traits::kWarpsAcross, across = warp_id() % Traits::kWarpsAcross;
  for_each_tile<Traits>(product, [&](const Tile& tile) {
    constexpr bool of_m = Traits::kOfM, of_k = Traits::kOfK;
    const int32_t group = tile.group;
    if constexpr (of_k)
      if (params.accumulate && tile.begin == tile.end) return;
    const int64_t row = of_m ? tile.begin : int64_t{tile.row_tile} * Traits::kTileRows;
    const int64_t col = int64_t{tile.col_tile} * Traits::kOutCols;
    const int rows = at_most((of_m ? tile.end : product.rows) - row, Traits::kTileRows);
    const int cols = at_most(product.cols - col, Traits::kTileCols);
    const int length = of_m ? group < product.groups.count ? static_cast<int>(product.depth) : 0
                            : static_cast<int>(tile.end - tile.begin);
    float c[Traits::kSums] = {};
    if (length > 0) {
      const int64_t depth = of_m ? 0 : tile.begin;
      typename Traits::LoadA a(product.a, job.wide_a,
                               {of_m || of_k ? 0 : group, row, depth, rows, length}, 0);
      typename Traits::LoadB b(product.b, job.wide_b, {of_k ? 0 : group, col, depth, cols, length},
                               product.cols);
      const typename Traits::Warp warp(down * Traits::kWarpRows, across * Traits::kWarpCols);
      __syncthreads();  // the ring was the scratch of the tile before
      sum_tiles<Traits>(ring, (length - 1) / Traits::kTileDepth + 1, a, b, warp, c);
    }
    float* scratch = reinterpret_cast<float*>(ring) + warp_id() * Traits::Finisher::kScratchFloats;
    if (across * Traits::kChunk < cols)
      finish_rows<Traits>(params, product, group, row + down * Traits::kWarpRows,
                          rows - down * Traits::kWarpRows, col + across * Traits::kChunk, c,
                          scratch);
  });
}

template <class Traits>
Status launch_product(const Job& job, const typename Traits::Policy::Params& params, void* stream) {
  const int64_t tiles = most_tiles(job.product, Traits::kTileRows, Traits::kOutCols);
  if (tiles == 0) return Status::ok();
  const auto kernel = product_kernel<Traits>;
  const int64_t resident = resident_blocks(kernel, Traits::kThreads, Traits::kRingBytes);
  const dim3 grid(static_cast<unsigned>(std::min(tiles, resident)));
  return launch(kernel, LaunchConfig{grid, dim3(Traits::kThreads), Traits::kRingBytes, stream}, job,
                params);
}

// An M-grouped product with the tile of 16 rows, or of 128; fp32 has no smaller one.
template <class T, Major kMajor, class Policy>
Status launch_rows(const Job& job, const typename Policy::Params& params, void* stream) {
  if constexpr (sizeof(T) == 2)
    if (job.few_rows)
      return launch_product<ProductTraits<T, Grouping::kM, kMajor, Policy, 16>>(job, params,
                                                                                stream);
  return launch_product<ProductTraits<T, Grouping::kM, kMajor, Policy, 128>>(job, params, stream);
}

template <class T>
Status store(const Job& job, const StoreParams& out, void* stream) {
  if (job.product.grouping == Grouping::kK)
    return launch_product<ProductTraits<T, Grouping::kK, Major::kOuter, Store<T>, 128>>(job, out,
                                                                                        stream);
  if (job.b_major == Major::kOuter)
    return launch_rows<T, Major::kOuter, Store<T>>(job, out, stream);
  return launch_rows<T, Major::kDepth, Store<T>>(job, out, stream);
}

template <class T>
Status affine(const Job& job, const AffineWork& out, void* stream) {
  const auto with = [&]<Major kA, Major kB>() {
    return launch_product<ProductTraits<T, Grouping::kBatch, kB, Affine<T>, 128, kA>>(job, out,
                                                                                      stream);
  };
  if (job.a_major == Major::kOuter) return with.template operator()<Major::kOuter, Major::kOuter>();
  if (job.b_major == Major::kOuter) return with.template operator()<Major::kDepth, Major::kOuter>();
  return with.template operator()<Major::kDepth, Major::kDepth>();
}

}  // namespace kimi::gemm::sm80
