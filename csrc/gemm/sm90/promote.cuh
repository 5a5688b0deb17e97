// SPDX-License-Identifier: MIT
// What the FP8 product on Hopper is made of: its tile and shared memory, the promotion of partial
// sums, and the way from registers to rows of the output.
//
//   shared memory   A ring [stages][128 rows][128 B] | B ring [stages][columns][128 B] |
//                   scratch [8 warps][16 rows][160 B] | scales of rows [stages][2][96] and
//                   of columns [stages][4], fp32 | tiles [2] | barriers
#pragma once

#include <algorithm>

#include "common/dtype.h"
#include "device/convert.cuh"
#include "device/math.cuh"
#include "device/mbarrier.cuh"
#include "device/stmatrix.cuh"
#include "device/vec.cuh"
#include "device/warp.cuh"
#include "grouped_gemm/fp8.h"

namespace kimi::fp8 {

inline constexpr int kTileRows = 128, kConsumerRows = 64;  // of a block; of a consumer, and a load
inline constexpr int kRowBytes = 128;                      // of depth in a stage
// The scales of a load's rows and of up to 3 before them: a box of TMA begins at 16 bytes.
inline constexpr int kScaleRows = kConsumerRows + 4;
inline constexpr int kConsumers = 2, kConsumerWarps = 4 * kConsumers;
inline constexpr int kThreads = 128 * (1 + kConsumers);  // warpgroup 0 produces
inline constexpr int kCluster = 2;                       // blocks that share rows of A
inline constexpr int kTileSlots = 2;                     // tiles that the producer is ahead

// What the kernel is told.
struct Arguments {
  const int32_t* offsets;  // [E]
  const float* b_scale;    // [E, ceil(N / 128), ceil(K / 128)]
  const void* bias;        // [E, N] out_dtype or nullptr
  void* out;               // [R, N] out_dtype
  int64_t num_rows;
  int32_t cols, k_blocks, num_groups;
  kimi_dtype out_dtype;
  bool wide_out;  // 16 bytes divide out and its rows
};

// A block's next tile, from the producer to the consumers.
struct Work {
  int32_t row;    // first row
  int32_t group;  // num_groups: zero rows; negative: there are no more tiles
  int32_t rows;   // valid ones, 128 at most
  int32_t col;    // first column
  int32_t k_blocks;
};

template <int kTileCols>
struct Traits {
  static constexpr int kCols = kTileCols;
  static constexpr int kStages = kCols == 128 ? 6 : 5;
  static constexpr int kSums = kCols / 2;         // of a consumer's thread
  static constexpr int kChunks = kCols / 64;      // of columns that have one scale
  static constexpr int kScratchBytes = 16 * 160;  // of a warp
  static_assert(kCols == 128 || kCols == 192, "a tile begins at a multiple of 64 columns");

  struct Shared {
    alignas(1024) unsigned char a[kStages][kTileRows * kRowBytes];
    alignas(1024) unsigned char b[kStages][kCols * kRowBytes];
    alignas(128) unsigned char scratch[kConsumerWarps][kScratchBytes];
    alignas(128) float a_scale[kStages][kConsumers][96];  // kScaleRows used; 128 bytes divide each
    alignas(16) float b_scale[kStages][4];                // of 64 columns each, kChunks used
    Work tiles[kTileSlots];
    MBarrier full[kStages], empty[kStages];
    MBarrier tile_full[kTileSlots], tile_empty[kTileSlots];
    MBarrier turn;  // of consumer 1 to begin
  };
  static_assert(sizeof(Shared) <= 227 * 1024);
};

// A place in a ring and the parity of its round.
struct Place {
  int at = 0;
  uint32_t parity = 0;
  __device__ void next(int places) {
    if (++at == places) {
      at = 0;
      parity ^= 1;
    }
  }
};

// total += factor * partial, where the factor of a thread's two rows belongs to 64 columns.
template <int kSums>
__device__ inline void promote(float (&total)[kSums], const float (&partial)[kSums],
                               const float (&factor)[kSums / 32][2]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i)
    total[i] = fma_rn(factor[i / 32][i / 2 % 2], partial[i], total[i]);
}

// Output of a warp's 16 rows, from its sums: total[4 j + 2 h + i] is row lane/4 + 8 h, column
// 8 j + 2 (lane%4) + i. 128 bytes of each row at a time go through the scratch, so that memory is
// written by whole lines.
template <class Tr, class Out>
class Store {
 public:
  __device__ static void run(const Arguments& p, const Work& work, int first_row,
                             float (&total)[Tr::kSums], unsigned char* scratch) {
    const bool biased = p.bias != nullptr && work.group < p.num_groups;
    // A lane's 16 bytes of every fourth row.
    const int r = first_row + lane_id() / 8, byte = lane_id() % 8 * 16;
    const int col = work.col + byte / static_cast<int>(sizeof(Out));
    const unsigned char* const from = scratch + lane_id() / 8 * kStride + byte;
    Out* const to = static_cast<Out*>(p.out) + (int64_t{work.row} + r) * p.cols + col;
    const int rows = work.rows - r;
#pragma unroll
    for (int chunk = 0; chunk < Tr::kCols / kChunk; ++chunk) {
      const int at = chunk * kChunk;
      if (biased) add_bias(p, work.group, work.col + at, total, at / 2);
      put(total, at / 2, scratch);
      warp_barrier();
      const int cols = p.cols - col - at;
      if (p.wide_out) {
#pragma unroll
        for (int i = 0; i < 16; i += 4)
          if (i < rows && cols > 0)
            store16(to + int64_t{i} * p.cols + at, load16(from + i * kStride));
      } else {
#pragma unroll 1
        for (int i = 0; i < 16 && i < rows; i += 4)
          store_values(to + int64_t{i} * p.cols + at, from + i * kStride, cols);
      }
      warp_barrier();
    }
  }

 private:
  static constexpr int kChunk = 128 / sizeof(Out);              // columns: rows of 128 bytes
  static constexpr int kStride = sizeof(Out) == 2 ? 144 : 160;  // bytes: no bank conflicts
  static_assert(16 * kStride <= Tr::kScratchBytes);

  __device__ static void add_bias(const Arguments& p, int group, int col, float (&total)[Tr::kSums],
                                  int at) {
    const Out* bias = static_cast<const Out*>(p.bias) + int64_t{group} * p.cols;  // [N]
    const int first = col + lane_id() % 4 * 2;
#pragma unroll
    for (int i = 0; i < kChunk / 2; i += 4)
#pragma unroll
      for (int k = 0; k < 2; ++k) {
        const float value = to_float(bias[std::min(first + 2 * i + k, p.cols - 1)]);
        total[at + i + k] += value;
        total[at + i + 2 + k] += value;
      }
  }

  // total[at ...] of kChunk columns.
  __device__ static void put(const float (&total)[Tr::kSums], int at, unsigned char* scratch) {
    const int lane = lane_id();
    if constexpr (sizeof(Out) == 2) {
      unsigned char* const row = scratch + lane % 16 * kStride + lane / 16 * 16;
#pragma unroll
      for (int i = 0; i < kChunk / 2; i += 8)
        stmatrix_x4(row + 4 * i, round_pair<Out>(total[at + i], total[at + i + 1]),
                    round_pair<Out>(total[at + i + 2], total[at + i + 3]),
                    round_pair<Out>(total[at + i + 4], total[at + i + 5]),
                    round_pair<Out>(total[at + i + 6], total[at + i + 7]));
    } else {
#pragma unroll
      for (int i = 0; i < kChunk / 2; i += 2) {
        unsigned char* const pair = scratch + (lane / 4 + i / 2 % 2 * 8) * kStride + lane % 4 * 8;
        *reinterpret_cast<Vec<float, 2>*>(pair + i / 4 * 32) = {{total[at + i], total[at + i + 1]}};
      }
    }
  }

  __device__ static void store_values(Out* to, const unsigned char* from, int cols) {
    constexpr int kValues = 16 / sizeof(Out);
#pragma unroll
    for (int i = 0; i < kValues; ++i)
      if (i < cols) to[i] = reinterpret_cast<const Out*>(from)[i];
  }
};

}  // namespace kimi::fp8
