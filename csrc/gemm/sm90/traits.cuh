// SPDX-License-Identifier: MIT
// The shapes of the Hopper product: what a block holds and how its threads share the work.
//
//   warpgroup 0    producers: TMA, or cp.async where rows are gathered, into a ring of stages
//   warpgroups 1,2 consumers: wgmma from the ring, then the epilogue
//
//   stage        P tile             Q tile              64 deep, 128-byte swizzle
//   kWide        128 rows           256 rows of Q       a warpgroup: 64 x 256 of C
//   kNarrow      128                128                 64 x 128
//   kFew         up to 64           128                 64 columns of C x 64 rows: Q is the M of
//                                                       wgmma and C comes out transposed
//
// kActivate halves the columns: the Q tile is a gate box and an up box of the same columns.
// Blocks may work in pairs (clusters of two) with kWide and kNarrow: 256 rows of P beside each
// other, each loads half of the Q tile into both.
#pragma once

#include <algorithm>

#include "device/mbarrier.cuh"
#include "device/tensor_map.cuh"
#include "device/wgmma.cuh"
#include "gemm/epilogue.cuh"
#include "gemm/schedule.cuh"
#include "gemm/sm90/job.h"

namespace kimi::grouped::sm90 {

constexpr int kBlockDepth = 64;             // of a stage
constexpr int kRowBytes = 2 * kBlockDepth;  // 128: one row of the swizzle
constexpr int kGroupThreads = 128, kThreads = 3 * kGroupThreads;
constexpr int kConsumerWarps = 8;
constexpr int kBoxBytes = 64 * kRowBytes;  // 64 rows, or with Major::kOuter 64 outer x 64 deep
constexpr int kStoreBoxBytes = 16 * kRowBytes;
constexpr int kSharedLimit = 227 * 1024;
constexpr int kGathers = 2;  // groups of cp.async that stay in flight
// 65536 registers: 128 (kProducer + 2 kConsumer).
constexpr int kProducerRegisters = 56, kConsumerRegisters = 224;

// kMajor: how Q lies in memory.
template <class T_, Ragged kRagged, Epilogue kEpilogue_, Major kMajor, Shape kShape>
struct Traits {
  using T = T_;
  static constexpr bool kFew = kShape == Shape::kFew;
  static constexpr bool kDepthwise = kRagged == Ragged::kDepth;
  static constexpr bool kPairs = kEpilogue_ == Epilogue::kActivate;
  static constexpr Epilogue kEpilogue = kEpilogue_;
  static constexpr Major kPMajor = kDepthwise ? Major::kOuter : Major::kDepth;
  static constexpr Major kQMajor = kMajor;
  static_assert(!kDepthwise || (kQMajor == Major::kOuter && !kFew));

  static constexpr int kTileRows = kFew ? 64 : 128;
  static constexpr int kTileCols = (kShape == Shape::kWide && !kPairs) ? 256 : 128;
  static constexpr int kQRows = kTileCols * (kPairs ? 2 : 1);
  static constexpr int kPBoxRows = kFew ? 8 : kTileRows;
  static constexpr int kQBoxRows = kQRows / 2;  // one for each block of a pair, or gate and up
  static constexpr int kPBytes = kTileRows * kRowBytes, kQBytes = kQRows * kRowBytes;
  static constexpr int kStageBytes = kPBytes + kQBytes;
  // Sums of a thread.
  static constexpr int kSums = kFew ? 32 * (kPairs ? 2 : 1) : kQRows / 2;

  using Finisher = Finish<T, kEpilogue, kFew || kPairs ? 16 : 32>;
  static constexpr int kChunk = kFew || kPairs ? 16 : 32;
  static constexpr bool kStoresByTma = kEpilogue == Epilogue::kStore && !kFew;
  // Of a warp.
  static constexpr int kScratchBytes =
      std::max(Finisher::kScratchFloats * 4, kStoresByTma ? 2 * kStoreBoxBytes : 0);
  static constexpr int kStages =
      std::min(8, (kSharedLimit - kConsumerWarps * kScratchBytes - 256) / kStageBytes);
  static_assert(kStages >= kGathers + 2);  // a gathered stage shows only kGathers stages later
  static constexpr int kSharedBytes =
      kStages * kStageBytes + kConsumerWarps * kScratchBytes + 2 * kStages * 8;

  using Schedule = std::conditional_t<kDepthwise, DepthSchedule<>, RowSchedule<kTileRows>>;
};

// What TMA is told of P and Q, where they have no index, and of C, where it writes it.
struct Maps {
  TensorMap p, q, out;
  bool has_out;
};

// Where a ring of stages is.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ void next() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// The block's shared memory.
template <class X>
struct Shared {
  char* stages;  // [kStages][P tile, Q tile]
  __device__ char* p_tile(int stage) const { return stages + stage * X::kStageBytes; }
  __device__ char* q_tile(int stage) const { return p_tile(stage) + X::kPBytes; }
  __device__ char* scratch(int warp) const {
    return stages + X::kStages * X::kStageBytes + warp * X::kScratchBytes;
  }
  __device__ MBarrier& full(int stage) const { return barriers()[stage]; }
  __device__ MBarrier& empty(int stage) const { return barriers()[X::kStages + stage]; }

 private:
  __device__ MBarrier* barriers() const {
    return reinterpret_cast<MBarrier*>(scratch(kConsumerWarps));
  }
};

// The tiles of this block, in turn. Every warp walks for itself.
template <class X>
class Tiles {
 public:
  __device__ Tiles(const Product& p, int blocks, int rank)
      : schedule_(make(p, blocks)),
        index_(blockIdx.x / static_cast<unsigned>(blocks)),
        step_(gridDim.x / static_cast<unsigned>(blocks)),
        blocks_(blocks),
        rank_(rank) {}

  // `row` is that of C, in the matrix of the group with kDepth.
  __device__ bool next(Tile& tile, int64_t& row) {
    if (!schedule_.find(index_, tile)) return false;
    index_ += step_;
    if constexpr (X::kDepthwise)
      row = (int64_t{tile.row_tile} * blocks_ + rank_) * X::kTileRows;
    else
      row = tile.begin += rank_ * X::kTileRows;
    return true;
  }

 private:
  __device__ static typename X::Schedule make(const Product& p, int blocks) {
    const int64_t cols = (static_cast<uint32_t>(p.cols) + X::kTileCols - 1) / X::kTileCols;
    if constexpr (X::kDepthwise) {
      const uint32_t rows = static_cast<uint32_t>(blocks * X::kTileRows);
      return {p, (static_cast<uint32_t>(p.rows) + rows - 1) / rows, cols};
    } else {
      return {p, cols, X::kEpilogue == Epilogue::kStore, {}, blocks};
    }
  }

  typename X::Schedule schedule_;
  int64_t index_, step_;
  int blocks_, rank_;
};

// Stages that a tile takes: none for the zero rows and for groups without rows.
template <class X>
__device__ inline int depth_blocks(const Product& p, const Tile& tile) {
  const int64_t depth = X::kDepthwise               ? tile.end - tile.begin
                        : tile.group < p.num_groups ? p.depth
                                                    : 0;
  return static_cast<int>((depth + kBlockDepth - 1) / kBlockDepth);
}

}  // namespace kimi::grouped::sm90
