// SPDX-License-Identifier: MIT
// What FP8 loads beside A and B for each stage of 128 of depth, its block of scales:
//
//   of rows     a box of TMA beside the 64 rows of A, from the last row on that 4 divides
//   of columns  one number for 64 columns, by a load of its own
#pragma once

#include <algorithm>

#include "gemm/sm90/ring.cuh"

namespace kimi::gemm::sm90 {

// The scales of a tile's columns, 64 at a time: column block c / 128 of b_scale, whose size times
// 2^14 is that of b. A tile begins at a multiple of 64, so it lies in two column blocks at most;
// columns beyond N have any scale. Gate and up: a block each, for 128 divides N.
template <class X>
struct ColumnScales {
  int first, last;  // of the scales, [ceil(K / 128)]
  bool split;       // after the first 64 columns

  __device__ ColumnScales(const Product& p, const Work& work) {
    const int blocks = (static_cast<int>(p.cols) + kScaleDepth - 1) / kScaleDepth,
              block = std::min(work.col / kScaleDepth, blocks - 1), depth = stages_of<X>(work);
    split = !X::kGated && work.col % kScaleDepth != 0;
    first = (work.group * blocks * (X::kGated ? 2 : 1) + block) * depth;
    last = first;
    if (X::kGated)
      last += blocks * depth;
    else if (X::kTileCols > kScaleDepth && block + 1 < blocks)
      last += depth;
  }
  __device__ void load(const float* scales, int step, float (&scale)[X::kColumnScales]) const {
    scale[0] = scales[first + step];
    scale[X::kColumnScales - 1] = scales[last + step];
    if (X::kColumnScales == 3) scale[1] = split ? scale[2] : scale[0];
  }
};

}  // namespace kimi::gemm::sm90
