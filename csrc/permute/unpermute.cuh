// SPDX-License-Identifier: MIT
// unpermute on CUDA: one block a token, one thread 16 bytes of columns.
//
//   y[row_map[t,0]] .. y[row_map[t,7]]   8 loads of 16 bytes in flight, then
//   sum = fma(w[t,k], y, sum)            k = 0, 1, ... in fp32, rounded once
//
// Further slots come in further batches of 8. With few tokens several blocks share the columns of a
// token. Addresses that 16 bytes do not divide go value by value.
//
// Cost (T 4096, K 8, H 7168, bf16): 470 MB read, 59 MB written; 670 threads an SM hold 86 KB of
// loads in flight, more than twice what the latency asks for. Measured on an H100: 2.8 TB/s, 93 %
// of what a copy moves there; 2.5 us for one token in a graph. fp16 is converted in integer
// arithmetic, about 10 instructions a value; predicted 3 TB/s on an H200, not measured.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "device/math.cuh"
#include "device/overlap.cuh"
#include "permute/permute.cuh"
#include "permute/permute.h"

namespace kimi::permutation {
namespace {  // each architecture's file has its own

constexpr int kBatch = 8;  // rows in flight

// kColumns values: 16 bytes, or one.
template <class T, int kColumns>
__global__ void __launch_bounds__(kMaxThreads, 3)
    unpermute_kernel(const __grid_constant__ UnpermuteParams p) {
  using Columns = Vec<T, kColumns>;
  constexpr bool kWide = sizeof(Columns) == 16;
  wait_for_previous();
  let_next_start();
  const bool weighted = p.weights != nullptr;
  const int64_t step = int64_t{gridDim.y} * blockDim.x * kColumns;
  for (int64_t t = blockIdx.x; t < p.num_tokens; t += gridDim.x) {
    const int32_t* row_map = p.row_map + t * p.top_k;
    const float* weights = weighted ? p.weights + t * p.top_k : nullptr;
    for (int64_t h = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * kColumns; h < p.hidden;
         h += step) {
      float sum[kColumns] = {};
      for (int first = 0; first < p.top_k; first += kBatch) {
        int32_t row[kBatch];
        Columns y[kBatch];
#pragma unroll
        for (int k = 0; k < kBatch; ++k) row[k] = first + k < p.top_k ? row_map[first + k] : -1;
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if (row[k] < 0) continue;
          const T* from = static_cast<const T*>(p.y) + row[k] * p.y_stride + h;
          if constexpr (kWide) {
            const uint4 bits = load16_fresh(from);
            memcpy(&y[k], &bits, sizeof bits);
          } else {
            y[k][0] = *from;
          }
        }
#pragma unroll
        for (int k = 0; k < kBatch; ++k) {
          if (row[k] < 0) continue;  // adding zero could turn -0 to +0
          const float w = weighted ? weights[first + k] : 1.0f;
#pragma unroll
          for (int i = 0; i < kColumns; ++i) sum[i] = fma_rn(w, to_float(y[k][i]), sum[i]);
        }
      }
      Columns x;
#pragma unroll
      for (int i = 0; i < kColumns; ++i) x[i] = from_float<T>(sum[i]);
      T* to = static_cast<T*>(p.x) + t * p.hidden + h;
      if constexpr (kWide) {
        uint4 bits;
        memcpy(&bits, &x, sizeof bits);
        store16(to, bits);  // read soon: it stays in the cache where it fits
      } else {
        *to = x[0];
      }
    }
  }
}

Status launch_unpermute(const UnpermuteParams& p, bool overlaps, void* stream) {
  if (p.num_tokens == 0 || p.hidden == 0) return Status::ok();
  return dispatch(p.dtype, [&]<class T>() {
    const uint64_t y_stride = static_cast<uint64_t>(p.y_stride) * sizeof(T);
    const uint64_t row_bytes = static_cast<uint64_t>(p.hidden) * sizeof(T);
    return with_widest_unit(
        {address_bits(p.x), address_bits(p.y), y_stride, row_bytes}, [&]<class Unit>() {
          constexpr int kColumns = sizeof(Unit) == 16 ? 16 / sizeof(T) : 1;
          return launch_by_columns(unpermute_kernel<T, kColumns>, p, p.num_tokens,
                                   p.hidden / kColumns, stream, overlaps);
        });
  });
}

}  // namespace
}  // namespace kimi::permutation
