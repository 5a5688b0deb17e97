// SPDX-License-Identifier: MIT
// The consumers of the Hopper product: wgmma over the stages of a tile, then its epilogue.
//
//   wait full | 4 wgmma, 16 deep each | commit | wait for the stage before | release that one
//
// One stage's products are always in flight, and the ring is filled meanwhile. The next tile is
// looked up while the last products run.
#pragma once

#include <utility>

#include "device/barrier.cuh"
#include "device/cluster.cuh"
#include "device/fence.cuh"
#include "device/vec.cuh"
#include "gemm/sm90/store.cuh"
#include "gemm/sm90/traits.cuh"

namespace kimi::grouped::sm90 {

constexpr int kConsumerBarrier = 1;

// `kCount` of the sums from kFrom on.
template <int kFrom, int kCount, int kN>
__device__ __forceinline__ float (&part(float (&d)[kN])) [kCount] {
  static_assert(kFrom + kCount <= kN);
  return *reinterpret_cast<float (*)[kCount]>(&d[kFrom]);
}

// The products of one stage. `keep` false: d does not count before.
template <class X>
__device__ __forceinline__
    void multiply(const Shared<X>& shared, int stage, int group, bool keep, float (&d)[X::kSums]) {
  using T = typename X::T;
  const char* const p_tile = shared.p_tile(stage);
  const char* const q_tile = shared.q_tile(stage);
  const char* const m_tile = (X::kFew ? q_tile : p_tile) + group * kBoxBytes;
  if constexpr (X::kFew) {
    const uint64_t a = wgmma_descriptor<X::kQMajor>(m_tile);
    const uint64_t b = wgmma_descriptor<X::kPMajor>(p_tile);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint64_t tokens = wgmma_advance<X::kPMajor>(b, k);
      wgmma<T, 64, X::kQMajor, X::kPMajor>(part<0, 32>(d), wgmma_advance<X::kQMajor>(a, k), tokens,
                                           keep || k > 0);
    }
    if constexpr (X::kPairs) {
      const uint64_t up = wgmma_descriptor<X::kQMajor>(m_tile + X::kTileCols * kRowBytes);
#pragma unroll
      for (int k = 0; k < 4; ++k)
        wgmma<T, 64, X::kQMajor, X::kPMajor>(part<32, 32>(d), wgmma_advance<X::kQMajor>(up, k),
                                             wgmma_advance<X::kPMajor>(b, k), keep || k > 0);
    }
  } else {
    const uint64_t a = wgmma_descriptor<X::kPMajor>(m_tile);
    const uint64_t b = wgmma_descriptor<X::kQMajor>(q_tile);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      wgmma<T, X::kQRows, X::kPMajor, X::kQMajor>(d, wgmma_advance<X::kPMajor>(a, k),
                                                  wgmma_advance<X::kQMajor>(b, k), keep || k > 0);
  }
}

// Rows `valid`.. of a kDepth stage belong to the next group: 0 in both operands, for what is there
// may be infinite. All consumers.
template <class X>
__device__ inline void clear_rows(const Shared<X>& shared, int stage, int valid) {
  constexpr int kBoxes = X::kStageBytes / kBoxBytes;
  const int end = kBoxBytes - valid * kRowBytes;
  char* const first = shared.p_tile(stage) + valid * kRowBytes;
  for (int i = 16 * (static_cast<int>(threadIdx.x) - kGroupThreads); i < end;
       i += 16 * 2 * kGroupThreads)
#pragma unroll 1
    for (int box = 0; box < kBoxes; ++box) store16(first + box * kBoxBytes + i, uint4{0, 0, 0, 0});
  fence_async_shared();
  named_barrier_sync(kConsumerBarrier, 2 * kGroupThreads);
}

// The sums of a tile to memory; a warp has 16 rows of its group's 64, with kFew 16 columns.
template <class X>
__device__ inline void finish_tile(const Product& p, const Tile& tile, int64_t row, int group,
                                   const float (&d)[X::kSums], float* scratch) {
  constexpr int kHalf = X::kPairs ? X::kSums / 2 : 0;  // where the up sums begin
  constexpr int kChunks = X::kFew ? X::kTileRows / 16 : X::kTileCols / X::kChunk;
  const int64_t end = X::kDepthwise ? p.rows : tile.end;
  const int warp = warp_id() % 4;
  int64_t col = int64_t{tile.col_tile} * X::kTileCols;
  if constexpr (X::kFew)
    col += group * 64 + warp * 16;
  else
    row += group * 64 + warp * 16;
#pragma unroll 1
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    const int64_t left = end - row;
    if (left <= 0 || col >= p.cols) return;
    [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
      (
          [&] {
            if (chunk != kIndex) return;
            constexpr int kAt = kIndex * (X::kFew ? 8 : X::kChunk / 2);
            if constexpr (X::kFew)
              X::Finisher::template collect_transposed<kAt, kHalf + kAt>(d, scratch);
            else
              X::Finisher::template collect<kAt, kHalf + kAt>(d, scratch);
          }(),
          ...);
    }(std::make_integer_sequence<int, kChunks>());
    X::Finisher::write(p, Rows{tile.group, row, left < 16 ? static_cast<int>(left) : 16}, col,
                       scratch);
    if constexpr (X::kFew)
      row += 16;
    else
      col += X::kChunk;
  }
}

// The same by TMA where it can.
template <class X>
__device__ inline void store_tile(const Product& p, const Maps& maps, const Tile& tile, int64_t row,
                                  int group, const float (&d)[X::kSums], char* scratch) {
  if constexpr (X::kStoresByTma) {
    const int64_t first = row + group * 64 + warp_id() % 4 * 16;
    const int64_t left = (X::kDepthwise ? p.rows : tile.end) - first;
    if (maps.has_out && left <= 0) return;
    if (maps.has_out && (X::kDepthwise || left >= 16)) {
      const int32_t col = tile.col_tile * X::kTileCols;
      if (p.out_dtype == KIMI_FLOAT32)
        store_by_tma<X, float>(p, maps.out, tile.group, static_cast<int32_t>(first), col, d,
                               scratch);
      else
        store_by_tma<X, typename X::T>(p, maps.out, tile.group, static_cast<int32_t>(first), col, d,
                                       scratch);
      return;
    }
    if (maps.has_out) {
      if (lane_id() == 0) tma_store_wait_read<0>();
      warp_barrier();
    }
  }
  finish_tile<X>(p, tile, row, group, d, reinterpret_cast<float*>(scratch));
}

// A tile without depth: kStore of zeros.
template <class X>
__device__ inline void clear_tile(const Product& p, const Tile& tile, int64_t row, int group) {
  if (X::kDepthwise && p.accumulate) return;
  constexpr int kCols = X::kFew ? 64 : X::kTileCols;
  row += warp_id() % 4 * 16 + (X::kFew ? 0 : group * 64);
  const int64_t left = (X::kDepthwise ? p.rows : tile.end) - row;
  if (left > 0)
    X::Finisher::clear(p, Rows{tile.group, row, left < 16 ? static_cast<int>(left) : 16},
                       int64_t{tile.col_tile} * X::kTileCols + (X::kFew ? group * 64 : 0), kCols);
}

template <class X>
__device__ inline void consume(const Product& p, const Maps& maps, const Shared<X>& shared,
                               int blocks, int rank) {
  const int group = static_cast<int>(threadIdx.x) / kGroupThreads - 1;
  char* const scratch = shared.scratch(warp_id() - kGroupThreads / kWarpSize);
  const auto release = [&](int stage) {
    if (lane_id() >= blocks) return;
    if (blocks == 1)
      mbarrier_arrive(shared.empty(stage));
    else
      mbarrier_arrive_in(shared.empty(stage), lane_id());
  };
  float d[X::kSums] = {};
  Tiles<X> tiles(p, blocks, rank);
  Ring<X::kStages> ring;
  Tile tile, after;
  int64_t row, row_after;
  bool more = tiles.next(tile, row);
  while (more) {
    const int steps = depth_blocks<X>(p, tile);
    if (steps > 0) {
      int before = 0;
      wgmma_fence(d);
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        mbarrier_wait(shared.full(ring.stage), ring.phase);
        if constexpr (X::kDepthwise) {
          const int64_t valid = tile.end - tile.begin - int64_t{step} * kBlockDepth;
          if (valid < kBlockDepth) clear_rows<X>(shared, ring.stage, static_cast<int>(valid));
        }
        wgmma_fence();
        multiply<X>(shared, ring.stage, group, step > 0, d);
        wgmma_commit();
        wgmma_wait<1>();
        if (step > 0) release(before);
        before = ring.stage;
        ring.next();
      }
      more = tiles.next(after, row_after);
      wgmma_wait<0>();
      wgmma_fence(d);
      release(before);
      store_tile<X>(p, maps, tile, row, group, d, scratch);
    } else {
      more = tiles.next(after, row_after);
      if constexpr (X::kEpilogue == Epilogue::kStore) clear_tile<X>(p, tile, row, group);
    }
    tile = after;
    row = row_after;
  }
  if (X::kStoresByTma && maps.has_out && lane_id() == 0) tma_store_wait<0>();
}

}  // namespace kimi::grouped::sm90
