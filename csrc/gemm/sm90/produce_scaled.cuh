// SPDX-License-Identifier: MIT
// The producer of the FP8 product on Hopper: tiles from the offsets, handed on to the consumers,
// and for each stage of 128 of depth
//
//   A        64 rows by each block, to both; the upper ones only where there are any
//   a_scale  of the same rows, from the last row that 4 divides on: a box of one block of depth
//   B        the block's own columns
//   b_scale  one number for 64 columns, by a load of its own
#pragma once

#include <algorithm>

#include "device/cluster.cuh"
#include "device/tma.cuh"
#include "gemm/schedule.cuh"
#include "gemm/sm90/promote.cuh"

namespace kimi::fp8 {

struct Maps {
  TensorMap a;        // [R, K], boxes of 64 rows
  TensorMap a_scale;  // [ceil(K / 128), R], boxes of 68 rows
  TensorMap b;        // [E, N, K], boxes of kCols rows
};

// The scales of a tile's columns, 64 at a time: column block c / 128 of b_scale, whose size divided
// by 2^14 is that of b. A tile begins at a multiple of 64, so it lies in two column blocks at most;
// columns beyond N have any scale.
template <class Tr>
struct ColumnScales {
  int first, last;  // of b_scale, [ceil(K / 128)]
  bool split;       // after the first 64 columns

  __device__ ColumnScales(const Arguments& p, const Work& work) {
    const int blocks = (p.cols + kBlock - 1) / kBlock,
              block = std::min(work.col / kBlock, blocks - 1);
    split = work.col % kBlock != 0;
    first = (work.group * blocks + block) * p.k_blocks;
    last = first + (Tr::kCols > kBlock && block + 1 < blocks ? p.k_blocks : 0);
  }
  __device__ void load(const Arguments& p, int kb, float (&scale)[Tr::kChunks]) const {
    scale[0] = p.b_scale[first + kb];
    scale[Tr::kChunks - 1] = p.b_scale[last + kb];
    if (Tr::kChunks == 3) scale[1] = split ? scale[2] : scale[0];
  }
};

// One thread, for all stages of a tile.
template <class Tr>
__device__ void load_tile(const Arguments& p, typename Tr::Shared& s, const Maps& maps,
                          const Work& work, Place& stage) {
  constexpr uint32_t kRowsBytes = kConsumerRows * kRowBytes + kScaleRows * sizeof(float);
  constexpr uint16_t kBoth = (1u << kCluster) - 1;
  const int rank = cluster_rank(), loads = work.rows > kConsumerRows ? 2 : 1;
  const int32_t row = work.row + rank * kConsumerRows;
  const ColumnScales<Tr> scales(p, work);
  for (int kb = 0; kb < work.k_blocks; ++kb, stage.next(Tr::kStages)) {
    float scale[Tr::kChunks];  // on its way while the stage is awaited
    scales.load(p, kb, scale);
    MBarrier& full = s.full[stage.at];
    mbarrier_wait(s.empty[stage.at], stage.parity ^ 1);
#pragma unroll
    for (int c = 0; c < Tr::kChunks; ++c) s.b_scale[stage.at][c] = scale[c];
    mbarrier_arrive_expect_tx(full, Tr::kCols * kRowBytes + loads * kRowsBytes);
    if (rank < loads) {
      tma_load_multicast(s.a[stage.at] + rank * kConsumerRows * kRowBytes, maps.a, full,
                         kb * kBlock, row, kBoth);
      tma_load_multicast(s.a_scale[stage.at][rank], maps.a_scale, full, row & ~3, kb, kBoth);
    }
    tma_load(s.b[stage.at], maps.b, full, kb * kBlock, work.col, work.group);
  }
}

// The first warp of the producer.
template <class Tr>
__device__ void produce(const Arguments& p, typename Tr::Shared& s, const Maps& maps) {
  grouped::Product product{};
  product.offsets = p.offsets;
  product.num_rows = p.num_rows;
  product.num_groups = p.num_groups;
  const int pairs = (p.cols + kCluster * Tr::kCols - 1) / (kCluster * Tr::kCols);
  grouped::RowSchedule<kTileRows> schedule(product, pairs, true);
  Place slot, stage;
  for (int64_t index = blockIdx.x / kCluster;; index += gridDim.x / kCluster) {
    grouped::Tile tile;
    Work work{0, -1, 0, 0, 0};
    if (schedule.find(index, tile)) {
      const int64_t left = tile.end - tile.begin;
      work.row = static_cast<int32_t>(tile.begin);
      work.group = tile.group;
      work.rows = left < kTileRows ? static_cast<int32_t>(left) : kTileRows;
      work.col = (tile.col_tile * kCluster + cluster_rank()) * Tr::kCols;
      work.k_blocks = tile.group < p.num_groups ? p.k_blocks : 0;
    }
    if (lane_id() == 0) {
      mbarrier_wait(s.tile_empty[slot.at], slot.parity ^ 1);
      s.tiles[slot.at] = work;
      mbarrier_arrive(s.tile_full[slot.at]);
      load_tile<Tr>(p, s, maps, work, stage);
    }
    warp_barrier();
    if (work.group < 0) return;
    slot.next(kTileSlots);
  }
}

}  // namespace kimi::fp8
