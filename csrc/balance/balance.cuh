// SPDX-License-Identifier: MIT
// What the losses' CUDA kernels share: a row of logits as a warp reads it (lane l owns experts l,
// l+32, ...) and the sum over a row.
#pragma once

#include "balance/balance.h"
#include "topk_gate/score.cuh"

namespace kimi::balance {

using namespace gate;

inline constexpr int kThreads = kWarps * kWarpSize;  // of a block

// The sum of 32 lanes' partial sums, in the order of balance.h.
__device__ inline float warp_sum(float partial) {
#pragma unroll
  for (int half = 16; half > 0; half /= 2) partial = add_rn(partial, warp_exchange(partial, half));
  return partial;
}

template <class T>
struct Row {
  const T* logits;
  int num_experts;
  /// The cleaned logit of expert e < num_experts.
  __device__ float operator[](int e) const { return clean<CudaOps>(to_float(logits[e])); }
};

// What score(z, function, scale) needs of the row.
template <class T>
__device__ RowScale scale_of(Row<T> row, kimi_score_function function) {
  if (function != KIMI_SCORE_SOFTMAX) return {};
  return softmax_scale_of(row.num_experts, [&](int e) { return row[e]; });
}

// 1 / D and m of a row.
struct Mean {
  float inverse, mean;
};

// Calls each(e, z, s) for the lane's experts.
template <class T, class Each>
__device__ Mean mean_of(Row<T> row, kimi_score_function function, const int32_t* counts,
                        Each each) {
  float sum = 0.0f, weighted = 0.0f;
  with_score(function, scale_of(row, function), [&](auto score_of) {
#pragma unroll 4
    for (int e = lane_id(); e < row.num_experts; e += kWarpSize) {
      const float z = row[e], s = score_of(z);
      each(e, z, s);
      sum = add_rn(sum, s);
      weighted = add_rn(weighted, mul_rn(static_cast<float>(counts[e]), s));
    }
  });
#pragma unroll
  for (int half = 16; half > 0; half /= 2) {
    sum = add_rn(sum, warp_exchange(sum, half));
    weighted = add_rn(weighted, warp_exchange(weighted, half));
  }
  const float inverse = div_rn(1.0f, add_rn(sum, kShareEpsilon));
  return {inverse, mul_rn(weighted, inverse)};
}

// One block: runs[0..count) summed in order, fetched by all threads, added by the first, which has
// the result. `tile` [kThreads] in shared memory.
__device__ inline float sum_runs(const float* sums, int64_t runs, float* tile) {
  const int thread = static_cast<int>(threadIdx.x);
  float sum = 0.0f;
  for (int64_t first = 0; first < runs; first += kThreads) {
    const int count = static_cast<int>(runs - first < kThreads ? runs - first : kThreads);
    if (thread < count) tile[thread] = sums[first + thread];
    __syncthreads();
#pragma unroll 8
    for (int i = 0; thread == 0 && i < count; ++i) sum = add_rn(sum, tile[i]);
    __syncthreads();
  }
  return sum;
}

}  // namespace kimi::balance
