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

}  // namespace kimi::balance
