// SPDX-License-Identifier: MIT
// The block's shared memory: a ring of stages, and a ring of tiles that the producers hand on to
// the consumers.
//
//   stages [kStages][A tile, B tile] | scratch [8 warps] | scales of FP8 | tiles | barriers
#pragma once

#include <algorithm>

#include "device/mbarrier.cuh"
#include "gemm/sm90/traits.cuh"

namespace kimi::gemm::sm90 {

// A place in a ring and the parity of its round.
template <int kPlaces>
struct Ring {
  int at = 0;
  uint32_t parity = 0;
  __device__ void next() {
    if (++at == kPlaces) {
      at = 0;
      parity ^= 1;
    }
  }
};

// A tile of this block.
struct Work {
  int32_t group;  // Groups::count: zero rows; negative: there are no more tiles
  int32_t row;    // first row, of C or of the group's matrix
  int32_t rows;   // that exist, kTileRows at most
  int32_t col;    // first column
  int32_t first;  // of the depth
  int32_t depth;  // 0 for zero rows and for groups without depth
  bool half;      // Traits::kHalves: the first kHalf columns
};

template <class X>
struct Stage {
  alignas(1024) char a[X::kABytes];
  char b[X::kBBytes];
};

// Of a stage of FP8: of the rows of each consumer, kScaleRows of them used, and of 64 columns each.
template <bool kScaled>
struct Scales {};
template <>
struct Scales<true> {
  alignas(128) float of_rows[kConsumers][96];  // 128 bytes divide each
  alignas(16) float of_columns[4];
};

template <class X>
struct Shared {
  Stage<X> stages[X::kStages];
  alignas(128) char scratch[kConsumerWarps][X::Epilogue::kScratchBytes];
  Scales<X::kScaled> scales[X::kStages];
  Work tiles[kTileSlots];
  MBarrier full[X::kStages], empty[X::kStages];
  MBarrier tile_full[kTileSlots], tile_empty[kTileSlots];
  MBarrier lead[kTileSlots];  // consumer 1 may begin: consume.cuh
  MBarrier turn[kConsumers];  // promote.cuh
};

// One past the last column of C in the tile, or beyond the tile.
template <class X>
__device__ inline int32_t end_of(const Product& p, const Work& work) {
  const int32_t cols = static_cast<int32_t>(p.cols);
  return X::kHalves && work.half ? std::min(cols, work.col + X::kHalf) : cols;
}

template <class X>
__device__ inline int stages_of(const Work& work) {
  return (work.depth + X::kBlockDepth - 1) / X::kBlockDepth;
}

}  // namespace kimi::gemm::sm90
