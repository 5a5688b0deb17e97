// SPDX-License-Identifier: MIT
// Rows to FP8 on CUDA: x is read once, 16 bytes at a time.
//
//   warp    4 rows x 128 columns: 8 lanes a row, 16 values a lane; 16 bytes of data a lane, the 4
//           scales side by side
//   block   8 warps: the same 4 rows, kb = warp, warp + 8, ...; of few rows blocks share them
//
// Cost: R K (2 + 1 + 4 / 128) bytes of bf16 rows, and few instructions: the division by the block's
// scale is a product with its reciprocal and two corrections, the second of which is exact by
// Markstein's theorem.
#pragma once

#include <algorithm>
#include <cfloat>

#include "device/convert.cuh"
#include "device/launch.cuh"
#include "device/math.cuh"
#include "device/vec.cuh"
#include "device/warp.cuh"
#include "fp8_rows/fp8_rows.h"

namespace kimi::fp8 {
namespace {

constexpr int kRowWarps = 8, kRowsOfWarp = 4, kLanes = 8, kValues = kBlock / kLanes;
constexpr uint32_t kSign = 0x80000000u;

// x / scale as IEEE rounds it, where that is 2^-11 or more; e4m3 makes 0 of less. A multiple of the
// divisor by a power of two keeps remainders normal.
class Divide {
 public:
  __device__ explicit Divide(float scale) {
    up_ = scale < 0x1p-60f ? 0x1p64f : 1.0f;
    divisor_ = mul_rn(scale, up_);
    reciprocal_ = reciprocal_rn(divisor_);
    if (!(divisor_ <= FLT_MAX)) divisor_ = 0.0f;  // no corrections: x / inf = 0, inf / inf is NaN
  }
  __device__ float operator()(float x) const {
    const float size = mul_rn(float_of(bits_of(x) & ~kSign), up_);
    float q = mul_rn(size, reciprocal_);
    q = fma_rn(fma_rn(-q, divisor_, size), reciprocal_, q);
    q = fma_rn(fma_rn(-q, divisor_, size), reciprocal_, q);
    return float_of(bits_of(q) | (bits_of(x) & kSign));
  }

 private:
  float up_, divisor_, reciprocal_;
};

template <class T>
__global__ void __launch_bounds__(kRowWarps* kWarpSize)
    fp8_rows_kernel(const __grid_constant__ Fp8RowsParams p, bool wide_in, bool wide_out) {
  const int64_t k_blocks = (p.k + kBlock - 1) / kBlock;
  const int64_t row = int64_t{blockIdx.x} * kRowsOfWarp + lane_id() / kLanes;
  const bool exists = row < p.num_rows;
  const int at = lane_id() % kLanes * kValues;
  const T* const x = static_cast<const T*>(p.x) + (exists ? row * p.x_row_stride : 0);
  uint8_t* const data = static_cast<uint8_t*>(p.data) + (exists ? row * p.k : 0);
  for (int64_t kb = int64_t{blockIdx.y} * kRowWarps + warp_id(); kb < k_blocks;
       kb += int64_t{gridDim.y} * kRowWarps) {
    const int64_t first = kb * kBlock + at, left = exists ? p.k - first : 0;
    const int count = left < 0 ? 0 : left < kValues ? static_cast<int>(left) : kValues;
    float v[2][8];
    load8(x + first, v[0], std::min(count, 8), wide_in);
    load8(x + first + 8, v[1], std::max(count - 8, 0), wide_in);
    uint32_t most = 0;  // as integers: a NaN is above all numbers
#pragma unroll
    for (int i = 0; i < kValues; ++i) most = std::max(most, bits_of(v[i / 8][i % 8]) & ~kSign);
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2)
      most = std::max(most, warp_exchange(most, distance));
    const float quotient = div_rn(float_of(most), kMax);
    const float scale = quotient < kSmallestScale ? kSmallestScale : quotient;
    const Divide divide(scale);
    uint32_t words[kValues / 4];
#pragma unroll
    for (int i = 0; i < kValues; i += 4) {
      float q[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) q[k] = divide(v[(i + k) / 8][(i + k) % 8]);
      words[i / 4] = round_pair_e4m3(q[0], q[1]) | round_pair_e4m3(q[2], q[3]) << 16;
    }
    if (wide_out && count == kValues) {
      store16(data + first, {words[0], words[1], words[2], words[3]});
    } else {
#pragma unroll
      for (int i = 0; i < kValues; ++i)
        if (i < count) data[first + i] = static_cast<uint8_t>(words[i / 4] >> i % 4 * 8);
    }
    if (exists && at == 0) p.scale[kb * p.scale_stride + row] = scale;
  }
}

inline Status run_rows(const Fp8RowsParams& p, void* stream) {
  if (p.num_rows == 0 || p.k == 0) return Status::ok();
  return dispatch(p.dtype, [&]<class T>() {
    const auto kernel = fp8_rows_kernel<T>;
    const int64_t groups = (p.num_rows + kRowsOfWarp - 1) / kRowsOfWarp;
    const int64_t split = (blocks(p.k) + kRowWarps - 1) / kRowWarps;
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
