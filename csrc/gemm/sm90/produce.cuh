// SPDX-License-Identifier: MIT
// The producers of the Hopper product hand tiles on and fill the ring of stages.
//
//   TMA      one thread; a stage is full when its bytes have come
//   scaled   the same, and the scales of FP8: produce_scaled.cuh
//   gather   all 128 threads: gather.cuh
//
// Where offsets and B are older than the kernel before, B of the first stages comes before that has
// ended: at decode up to 128 KB of weights a multiprocessor are on their way when A appears.
//
// Rows of the next group, or past the end, may come along: M-grouped they are never stored, and
// K-grouped the consumers clear them. Of A's upper 64 rows nothing comes where none exists.
#pragma once

#include "device/cluster.cuh"
#include "device/overlap.cuh"
#include "device/tma.cuh"
#include "gemm/schedule.cuh"
#include "gemm/sm90/job.h"
#include "gemm/sm90/produce_scaled.cuh"
#include "gemm/sm90/ring.cuh"

namespace kimi::gemm::sm90 {

// What the kernel is told of A and B beside the product.
struct Inputs {
  TensorMap a, b;         // of operands without an index
  bool whole_a, whole_b;  // K-grouped: a box is a stage
  int32_t tile_cols;      // Traits::kHalves: kTileCols or its half
  Trial trial;
};
struct ScaledInputs : Inputs {
  TensorMap row_scales;        // [ceil(K / 128), R], boxes of kScaleRows
  const float* column_scales;  // [E, ceil(N / 128), ceil(K / 128)]
};
template <class X>
using InputsOf = std::conditional_t<X::kScaled, ScaledInputs, Inputs>;

// The tiles of this block in turn, handed on to the consumers; visit(work) then loads the stages.
// Every producing warp walks for itself, the first one hands on.
template <class X, class Visitor>
__device__ inline void produce_tiles(const Product& p, const InputsOf<X>& in, Shared<X>& s,
                                     const Visitor& visit) {
  const int rank = X::kCluster == 1 ? 0 : cluster_rank();
  const int32_t tile_cols = X::kHalves ? in.tile_cols : X::kTileCols;
  const uint32_t cols = X::kCluster * static_cast<uint32_t>(tile_cols),
                 col_tiles = (static_cast<uint32_t>(p.cols) + cols - 1) / cols;
  const Order order{static_cast<uint32_t>(in.trial.swizzle), in.trial.turn != 0};
  const auto schedule = [&] {
    if constexpr (X::kGrouping == Grouping::kM) {
      return RowSchedule<kTileRows>(p.groups, col_tiles, X::Epilogue::kWritesZeros, {}, order);
    } else {
      const uint32_t row_tiles = (static_cast<uint32_t>(p.rows) + kTileRows - 1) / kTileRows;
      const bool lower = X::kGrouping == Grouping::kBatch && p.lower;
      return MatrixSchedule(p, row_tiles, col_tiles,
                            lower ? static_cast<uint32_t>(tile_cols) / kTileRows : 0, order);
    }
  };
  auto tiles = schedule();
  Ring<kTileSlots> slot;
  for (uint32_t index = blockIdx.x / X::kCluster;; index += gridDim.x / X::kCluster) {
    Tile tile;
    Work work{-1, 0, 0, 0, 0, 0, false};
    if (tiles.find(index, tile)) {
      constexpr bool kOfM = X::kGrouping == Grouping::kM;
      const int64_t row = kOfM ? tile.begin : int64_t{tile.row_tile} * kTileRows;
      const int64_t left = (kOfM ? tile.end : p.rows) - row;
      const int64_t depth = !kOfM                         ? tile.end - tile.begin
                            : tile.group < p.groups.count ? p.depth
                                                          : 0;
      work.group = tile.group;
      work.row = static_cast<int32_t>(row);
      work.rows = left < kTileRows ? static_cast<int32_t>(left) : kTileRows;
      work.col = (tile.col_tile * X::kCluster + rank) * tile_cols;
      work.first = kOfM ? 0 : static_cast<int32_t>(tile.begin);
      work.depth = static_cast<int32_t>(depth);
      if constexpr (X::kHalves) {
        const int32_t end = p.lower ? work.row + work.rows : static_cast<int32_t>(p.cols);
        work.half = std::min(tile_cols, end - work.col) <= X::kHalf;
      }
    }
    if (threadIdx.x == 0) {
      mbarrier_wait(s.tile_empty[slot.at], slot.parity ^ 1);
      s.tiles[slot.at] = work;
      mbarrier_arrive(s.tile_full[slot.at]);
    }
    visit(work);
    warp_barrier();
    if (work.group < 0) return;
    slot.next();
  }
}

// A stage of A and B by TMA. One thread.
template <class X>
class Loader {
 public:
  __device__ Loader(const Product& p, const InputsOf<X>& in, Shared<X>& s) : p_(p), in_(in), s_(s) {
    if constexpr (X::kCluster > 1) rank_ = cluster_rank();
  }

  __device__ void set_tile(const Work& work) { work_ = work; }

  __device__ void load(int stage, int step) const {
    MBarrier& full = s_.full[stage];
    const int32_t depth = depth_of(step);
    mbarrier_arrive_expect_tx(full, bytes());
    if (p_.a.index == nullptr) load_a(s_.stages[stage].a, full, depth);
    if constexpr (X::kScaled)
      if (rank_ < boxes())
        tma_load_multicast(s_.scales[stage].of_rows[rank_], in_.row_scales, full,
                           (work_.row + rank_ * kConsumerRows) & ~3, step, kAll);
    if (p_.b.index == nullptr) load_b(s_.stages[stage].b, full, depth);
  }

  // The same in two parts.
  __device__ void load_b_ahead(int stage, int step) const {
    mbarrier_arrive_expect_tx(s_.full[stage], bytes());
    load_b(s_.stages[stage].b, s_.full[stage], depth_of(step));
  }
  __device__ void load_a_behind(int stage, int step) const {
    load_a(s_.stages[stage].a, s_.full[stage], depth_of(step));
  }

 private:
  static constexpr bool kBatch = X::kGrouping == Grouping::kBatch,
                        kOfK = X::kGrouping == Grouping::kK;
  static constexpr uint16_t kAll = (1u << X::kCluster) - 1;

  __device__ int32_t depth_of(int step) const {
    return (kOfK ? work_.first : 0) + step * X::kBlockDepth;
  }

  // Of 64 rows of A.
  __device__ int boxes() const { return work_.rows > kConsumerRows ? 2 : 1; }

  // What comes to this block's stage, from the cluster's other block as well.
  __device__ uint32_t bytes() const {
    const int of_row_box =
        kBoxBytes + (X::kScaled ? kScaleRows * static_cast<int>(sizeof(float)) : 0);
    const bool half = work_.half && !(kOfK && in_.whole_b);
    return static_cast<uint32_t>((p_.a.index != nullptr ? 0
                                  : kOfK && in_.whole_a ? X::kABytes
                                                        : boxes() * of_row_box) +
                                 (p_.b.index != nullptr ? 0
                                  : half                ? X::kBBytes / 2
                                                        : X::kBBytes));
  }

  // Boxes of 64 rows; of a cluster each block loads one into all.
  __device__ void load_a(char* to, MBarrier& full, int32_t depth) const {
    if (kOfK && in_.whole_a) return tma_load(to, in_.a, full, 0, depth, work_.row / 64);
    const auto load_box = [&](int box) {
      const int32_t row = work_.row + box * kConsumerRows;
      const int32_t x = X::kAMajor == Major::kOuter ? row : depth,
                    y = X::kAMajor == Major::kOuter ? depth : row;
      char* const at = to + box * kBoxBytes;
      if constexpr (X::kCluster > 1)
        tma_load_multicast(at, in_.a, full, x, y, kAll);
      else if constexpr (kBatch)
        tma_load(at, in_.a, full, x, y, work_.group);
      else
        tma_load(at, in_.a, full, x, y);
    };
    if constexpr (X::kCluster == kConsumers) {
      if (rank_ < boxes()) load_box(rank_);
    } else {
      for (int box = 0; box < boxes(); ++box) load_box(box);
    }
  }

  // Boxes of kBBoxRows rows, kOuter of 64. With gate and up the second half of the tile is up.
  __device__ void load_b(char* to, MBarrier& full, int32_t depth) const {
    constexpr bool kOuter = X::kBMajor == Major::kOuter;
    constexpr int kBoxRows = kOuter ? 64 : X::kBBoxRows;
    if (kOfK && in_.whole_b) return tma_load(to, in_.b, full, 0, depth, work_.col / 64);
#pragma unroll
    for (int at = 0; at < X::kBRows; at += kBoxRows) {
      if (X::kHalves && work_.half && at >= X::kHalf) return;
      const int32_t row = at < X::kTileCols
                              ? work_.col + at
                              : static_cast<int32_t>(p_.cols) + work_.col + at - X::kTileCols;
      const int32_t x = kOuter ? row : depth, y = kOuter ? depth : row;
      if constexpr (X::kGrouping == Grouping::kK)
        tma_load(to + at * kRowBytes, in_.b, full, x, y);
      else
        tma_load(to + at * kRowBytes, in_.b, full, x, y, work_.group);
    }
  }

  const Product& p_;
  const InputsOf<X>& in_;
  Shared<X>& s_;
  Work work_{};
  int rank_ = 0;
};

// Whether the producer comes to the wait for the kernel before with B on its way.
template <class X>
__device__ inline bool reads_ahead(const Product& p) {
  return X::kGrouping == Grouping::kM && !X::kScaled && p.groups.older && p.a.index == nullptr;
}

template <class X>
__device__ inline void produce_by_tma(const Product& p, const InputsOf<X>& in, Shared<X>& s) {
  Loader<X> loader(p, in, s);
  Ring<X::kStages> ring;
  bool ahead = reads_ahead<X>(p);
  produce_tiles<X>(p, in, s, [&](const Work& work) {
    const int stages = stages_of<X>(work);
    loader.set_tile(work);
    int step = 0;
    if (ahead) {  // the ring is empty
      ahead = false;
      const int first = stages < X::kStages ? stages : X::kStages;
      if (lane_id() == 0)
        for (int i = 0; i < first; ++i) loader.load_b_ahead(i, i);
      wait_for_previous();
      let_next_start();
      if (lane_id() == 0)
        for (; step < first; ++step, ring.next()) loader.load_a_behind(step, step);
    }
    if (lane_id() != 0) return;
    [[maybe_unused]] const ColumnScales<X> scales(p, work);
#pragma unroll 1
    for (; step < stages; ++step, ring.next()) {
      if constexpr (X::kScaled) {
        float scale[X::kColumnScales];  // on its way while the stage is awaited
        scales.load(in.column_scales, step, scale);
        mbarrier_wait(s.empty[ring.at], ring.parity ^ 1);
#pragma unroll
        for (int c = 0; c < X::kColumnScales; ++c) s.scales[ring.at].of_columns[c] = scale[c];
      } else {
        mbarrier_wait(s.empty[ring.at], ring.parity ^ 1);
      }
      loader.load(ring.at, step);
    }
  });
}

}  // namespace kimi::gemm::sm90
