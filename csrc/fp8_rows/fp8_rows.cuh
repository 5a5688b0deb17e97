// SPDX-License-Identifier: MIT
// Rows to FP8 on CUDA: x is read once, 16 bytes at a time, and where a plan says so its rows leave
// for the experts at once.
//
//   warp    4 tokens x 128 columns: 8 lanes a token, 16 values a lane
//   lane    its values, divided, as 16 bytes to each of the token's rows; and of the rows that the
//           8 lanes know, 8 at a time, the scale of its own
//   block   8 warps: the same 4 tokens, kb = warp, warp + 8, ...; of few tokens blocks share them
//   further blocks: 4 rows of a plan each, of which the padding ones become blocks of zeros
//
// Cost: T K 2 bytes of bf16 tokens and R K (1 + 4 / 128) of rows: a token is quantised once for all
// of its experts. 4096 x 8 of 7168: 59 + 242 MB, *predicted* 0.11 ms at 2.8 TB/s, where rows that
// are permuted first and quantised then move 529 + 712 MB, 0.44 ms.
#pragma once

#include <algorithm>

#include "common/integer.h"
#include "device/launch.cuh"
#include "device/vec.cuh"
#include "device/warp.cuh"
#include "fp8_rows/quantize.cuh"

namespace kimi::fp8 {
namespace {

constexpr int kRowWarps = 8, kTokensOfWarp = 4, kLanes = 8, kValues = kBlock / kLanes;

template <class T>
__global__ void __launch_bounds__(kRowWarps* kWarpSize)
    fp8_rows_kernel(const __grid_constant__ Fp8RowsParams p, bool wide_in, bool wide_out) {
  const int64_t k_blocks = (p.k + kBlock - 1) / kBlock;
  const unsigned token_blocks =
      static_cast<unsigned>((p.num_tokens + kTokensOfWarp - 1) / kTokensOfWarp);
  const bool pads = blockIdx.x >= token_blocks;
  const int64_t item =
      int64_t{blockIdx.x - (pads ? token_blocks : 0)} * kTokensOfWarp + lane_id() / kLanes;
  const bool exists = item < (pads ? p.num_rows : p.num_tokens);
  const int lane = lane_id() % kLanes, at = lane * kValues;
  const T* const x = static_cast<const T*>(p.x) + (exists && !pads ? item * p.x_row_stride : 0);
  const int slots = pads || p.top_k == 0 ? 1 : p.top_k;
  for (int slot = 0; slot < slots; slot += kLanes) {
    int32_t mine = -1;  // the row of the lane's slot
    if (exists && slot + lane < slots) {
      if (pads ? p.source[item] < 0 : p.top_k == 0)
        mine = static_cast<int32_t>(item);
      else if (!pads)
        mine = p.row_map[item * p.top_k + slot + lane];
    }
    for (int64_t kb = int64_t{blockIdx.y} * kRowWarps + warp_id(); kb < k_blocks;
         kb += int64_t{gridDim.y} * kRowWarps) {
      const int64_t first = kb * kBlock + at, left = exists ? p.k - first : 0;
      const int count = left < 0 ? 0 : left < kValues ? static_cast<int>(left) : kValues;
      const int loaded = pads ? 0 : count;
      float v[2][8];
      load8(x + first, v[0], std::min(loaded, 8), wide_in);
      load8(x + first + 8, v[1], std::max(loaded - 8, 0), wide_in);
      uint32_t most = 0;
#pragma unroll
      for (int i = 0; i < kValues; ++i) most = std::max(most, size_bits(v[i / 8][i % 8]));
#pragma unroll
      for (int distance = 1; distance < kLanes; distance *= 2)
        most = std::max(most, warp_exchange(most, distance));
      const float scale = scale_of(float_of(most));
      const Divide divide(scale);
      uint32_t words[kValues / 4];
#pragma unroll
      for (int i = 0; i < kValues; i += 4) {
        float q[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) q[k] = divide(v[(i + k) / 8][(i + k) % 8]);
        words[i / 4] = round_pair_e4m3(q[0], q[1]) | round_pair_e4m3(q[2], q[3]) << 16;
      }
      if (mine >= 0) p.scale[kb * p.scale_stride + mine] = scale;
      for (int k = 0; k < kLanes && slot + k < slots; ++k) {
        const int64_t row = warp_broadcast(mine, (lane_id() & ~(kLanes - 1)) | k);
        if (row < 0) continue;
        uint8_t* const data = static_cast<uint8_t*>(p.data) + row * p.k + first;
        if (wide_out && count == kValues) {
          store16(data, {words[0], words[1], words[2], words[3]});
        } else {
#pragma unroll
          for (int i = 0; i < kValues; ++i)
            if (i < count) data[i] = static_cast<uint8_t>(words[i / 4] >> i % 4 * 8);
        }
      }
    }
  }
}

inline Status run_rows(Fp8RowsParams p, void* stream) {
  if (p.top_k == 0) p.num_tokens = p.num_rows;
  if (p.num_rows == 0 || p.k == 0) return Status::ok();
  return dispatch(p.dtype, [&]<class T>() {
    const auto kernel = fp8_rows_kernel<T>;
    const int64_t padded = p.top_k == 0 || p.source == nullptr ? 0 : p.num_rows,
                  groups = ceil_div(p.num_tokens, kTokensOfWarp) + ceil_div(padded, kTokensOfWarp);
    if (groups == 0) return Status::ok();
    const int64_t split = ceil_div(blocks(p.k), kRowWarps);
    const bool few = groups < 4 * resident_blocks(kernel, kRowWarps * kWarpSize, 0);
    const dim3 grid(static_cast<unsigned>(groups),
                    few ? static_cast<unsigned>(std::min<int64_t>(split, 65535)) : 1);
    const bool wide_in = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 &&
                         p.x_row_stride * static_cast<int64_t>(sizeof(T)) % 16 == 0;
    const bool wide_out = reinterpret_cast<uintptr_t>(p.data) % 16 == 0 && p.k % 16 == 0;
    return launch(kernel, {grid, dim3(kRowWarps * kWarpSize), 0, stream}, p, wide_in, wide_out);
  });
}

}  // namespace
}  // namespace kimi::fp8
