// SPDX-License-Identifier: MIT
// How a tile of A or B lies in shared memory: the direction that is contiguous in global memory is
// contiguous here too, in chunks of 16 bytes, which is what cp.async and ldmatrix move.
//
//   kDepthMajor  row = outer index, chunks along the depth       kOuterMajor  row = depth index
//
//   row 0  | 0 1 2 3 | row 1  | 0 1 2 3 |     a line of 128 bytes: all banks once
//   row 2  | 1 0 3 2 | row 3  | 1 0 3 2 |     chunk c of row r lies at c ^ key(r), so that the same
//   row 4  | 2 3 0 1 | ...                    chunk of 8 rows, what ldmatrix reads at once, is
//                                             in 8 different groups of 4 banks
#pragma once

#include <cstdint>

#include "device/major.h"
#include "device/platform.cuh"

namespace kimi::gemm::sm80 {

template <class T, Major kMajor, int kOuter, int kDepth>
struct TileLayout {
  static constexpr bool kDepthMajor = kMajor == Major::kDepth;
  static constexpr int kRows = kDepthMajor ? kOuter : kDepth;
  static constexpr int kRowBytes = (kDepthMajor ? kDepth : kOuter) * static_cast<int>(sizeof(T));
  static constexpr int kChunks = kRowBytes / 16;
  static constexpr int kPerChunk = 16 / static_cast<int>(sizeof(T));  // elements
  static constexpr int kBytes = kRows * kRowBytes;
  static_assert(kChunks >= 8 || kChunks == 4);

  // Rows whose distance is a multiple of 8 have the same key, of fp32 an even row and the next one
  // too. fp32 reads rows of the depth one by one and across: they need none.
  __device__ static int key(int row) {
    if (kChunks == 4 || (sizeof(T) == 4 && kDepthMajor)) return row / 2 % 4;
    return sizeof(T) == 4 ? 0 : row % 8;
  }
  __device__ static int offset(int row, int chunk) {
    return row * kRowBytes + (chunk ^ key(row)) * 16;
  }
};

}  // namespace kimi::gemm::sm80
