// SPDX-License-Identifier: MIT
// The shape of a Hopper product: what a block holds and how its threads share the work.
//
//   warpgroup 0    producers: TMA, or cp.async where rows are gathered, into a ring of stages
//   warpgroups 1,2 consumers, 64 rows each: wgmma from the ring, then the epilogue
//
//   stage        A tile             B tile              128 bytes of depth, 128-byte swizzle
//   16 bits      128 rows           256 rows of B       a consumer: 64 x 256 of C, or of its half
//   FP8          128                192 or 128          64 x 192 or 64 x 128
//
// An epilogue that takes gate and up halves the columns: the tile of B is a gate box and an up box
// of the same columns; FP8 multiplies one after the other, 128 rows each, for partial sums of both
// have no registers: 64 x 128 and 64 x 128. FP8 works in clusters of two blocks, which have columns of their own: each
// loads 64 rows of A, and their scales, into both.
#pragma once

#include <algorithm>
#include <type_traits>

#include "common/dtype.h"
#include "device/major.h"
#include "device/mbarrier.cuh"
#include "gemm/product.h"

namespace kimi::gemm::sm90 {

inline constexpr int kTileRows = 128, kConsumerRows = 64;
inline constexpr int kRowBytes = 128;             // of depth in a stage: a row of the swizzle
inline constexpr int kBoxBytes = 64 * kRowBytes;  // 64 outer x 128 bytes of depth, or across
inline constexpr int kGroupThreads = 128, kConsumers = 2, kConsumerWarps = 4 * kConsumers;
inline constexpr int kThreads = kGroupThreads * (1 + kConsumers);
inline constexpr int kTileSlots = 4;  // tiles that the producers are ahead, at most
inline constexpr int kSharedLimit = 227 * 1024;
// FP8: values of depth, and of columns, that share a scale; of a load's rows and of up to 3 before
// them, for a box of TMA begins at 16 bytes.
inline constexpr int kScaleDepth = 128, kScaleRows = kConsumerRows + 4;

// T: bf16, fp16, or e4m3 with scales. A is depth-major unless K-grouped.
template <class T_, Grouping kGrouping_, Major kBMajor_, class Epilogue_, int kTileCols_,
          Major kAMajor_ = kGrouping_ == Grouping::kK ? Major::kOuter : Major::kDepth>
struct Traits {
  using T = T_;
  using Epilogue = Epilogue_;
  static constexpr Grouping kGrouping = kGrouping_;
  static constexpr Major kAMajor = kAMajor_, kBMajor = kBMajor_;
  static constexpr bool kScaled = std::is_same_v<T, e4m3>;
  static constexpr bool kGated = Epilogue::kGated;

  static constexpr int kBlockDepth = kRowBytes / static_cast<int>(sizeof(T));  // of a stage
  static constexpr int kTileCols = kTileCols_, kBRows = kTileCols * (kGated ? 2 : 1);
  static constexpr int kABytes = kTileRows * kRowBytes, kBBytes = kBRows * kRowBytes;
  static constexpr int kSums = kBRows / 2;  // of a consumer's thread
  // Tiles of 256 columns of which at most 128 are wanted load and multiply the first half.
  static constexpr bool kHalves = kTileCols == 256;
  static constexpr int kHalf = kTileCols / 2;
  static constexpr int kBBoxRows = kHalves ? kHalf : kTileCols;  // of TMA, depth-major
  // FP8: the products of a stage come in so many parts, which share the partial sums.
  static constexpr int kParts = kScaled && kGated ? 2 : 1;
  static constexpr int kPartRows = kBRows / kParts;
  // Of columns that have one scale: 64, or gate and up.
  static constexpr int kColumnScales = kGated ? 2 : kTileCols / 64;
  static constexpr int kCluster = kScaled ? 2 : 1;
  // 504, three times what a thread is launched with: producer + 2 consumer. Scaled: a second array
  // of sums.
  static constexpr int kProducerRegisters = kScaled ? 56 : 72;
  static constexpr int kConsumerRegisters = kScaled ? 224 : 216;
  static_assert(!kScaled || kTileCols % 64 == 0, "a tile begins at a multiple of 64 columns");
  static_assert(kParts == 1 || kTileCols == kScaleDepth, "gate and up have one scale each");
  static_assert(kGrouping != Grouping::kK || (kAMajor == Major::kOuter && kBMajor == kAMajor));

  static constexpr int kStageBytes =
      kABytes + kBBytes + (kScaled ? 7 * 128 : 0) + 16;  // of it scales and barriers
  static constexpr int kStages =
      std::min(8, (kSharedLimit - kConsumerWarps * Epilogue::kScratchBytes - 512) / kStageBytes);
};

}  // namespace kimi::gemm::sm90
