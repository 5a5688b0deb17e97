// SPDX-License-Identifier: MIT
// kStore by TMA: a warp's 16 rows leave in boxes of 128 bytes a row, without waiting for memory.
//
//   sums -- stmatrix, rounded (fp32: 8 bytes a lane) --> 2 KiB, swizzled -- TMA store or add --> C
//
// Two boxes of a warp alternate: one is read by TMA while the other one is filled. Adding in fp32
// touches each element once, so that no order of additions is left open. Out of bounds nothing is
// written; rows of the next group would be, so a warp whose 16 rows are not all of its group takes
// the way of Finish.
#pragma once

#include <utility>

#include "device/convert.cuh"
#include "device/fence.cuh"
#include "device/stmatrix.cuh"
#include "device/tma.cuh"
#include "gemm/sm90/traits.cuh"

namespace kimi::grouped::sm90 {

// Columns of box kBox, from the registers to `box`.
template <class Out, int kBox, int kN>
__device__ inline void fill_box(const float (&d)[kN], char* box) {
  const int lane = lane_id();
  if constexpr (sizeof(Out) == 2) {
    // Lane l names row l % 8 of matrix l / 8: rows 0-7 and 8-15 of 8 columns, then of the next 8.
    const int row = lane % 16, half = lane / 16;
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      constexpr int kAt = kBox * 32;
      const float* c = d + kAt + 4 * j;
      stmatrix_x4(box + row * 128 + (((j + half) ^ (row % 8)) << 4), round_pair<Out>(c[0], c[1]),
                  round_pair<Out>(c[2], c[3]), round_pair<Out>(c[4], c[5]),
                  round_pair<Out>(c[6], c[7]));
    }
  } else {
    // Odd rows take the columns in another order: else two rows would meet in each bank.
    const int row = lane / 4;
    const bool odd = row % 2 != 0;
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int even_at = kBox * 16 + 4 * j + 2 * half, odd_at = even_at ^ 8;
        const int piece = 2 * (odd ? j ^ 2 : j) + lane % 4 / 2;
        char* to = box + (row + 8 * half) * 128 + ((piece ^ row) << 4) + lane % 2 * 8;
        *reinterpret_cast<Vec<float, 2>*>(to) = {
            {odd ? d[odd_at] : d[even_at], odd ? d[odd_at + 1] : d[even_at + 1]}};
      }
  }
}

// Columns col.. of a warp's 16 rows from `row` on. `boxes`: 4 KiB of the warp.
template <class X, class Out>
__device__ inline void store_by_tma(const Product& p, const TensorMap& map, int32_t group,
                                    int32_t row, int32_t col, const float (&d)[X::kSums],
                                    char* boxes) {
  constexpr int kCols = kRowBytes / static_cast<int>(sizeof(Out));
  const auto store_box = [&]<int kBox>() {
    char* const box = boxes + kBox % 2 * kStoreBoxBytes;
    const int32_t first = col + kBox * kCols;
    if (lane_id() == 0) tma_store_wait_read<1>();
    warp_barrier();
    if (first < p.cols) {
      fill_box<Out, kBox>(d, box);
      fence_async_shared();
      warp_barrier();
    }
    if (lane_id() != 0) return;
    if (first < p.cols) {
      if constexpr (X::kDepthwise) {
        if (p.accumulate)
          tma_reduce_add(map, box, first, row, group);
        else
          tma_store(map, box, first, row, group);
      } else {
        tma_store(map, box, first, row);
      }
    }
    tma_store_commit();  // an empty group too: the boxes alternate
  };
  [&]<int... kBox>(std::integer_sequence<int, kBox...>) {
    (store_box.template operator()<kBox>(), ...);
  }(std::make_integer_sequence<int, X::kTileCols / kCols>());
}

}  // namespace kimi::grouped::sm90
