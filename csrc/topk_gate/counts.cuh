// SPDX-License-Identifier: MIT
// tokens_per_expert on CUDA: a histogram for each block in shared memory, then integer atomics: any
// order gives the same sums.
#pragma once

#include <cstdint>

#include "device/atomic.cuh"
#include "topk_gate/score.cuh"

namespace kimi::gate {

// A block's own counts [E] in shared memory. clear() and add_to() are for all its threads.
struct BlockCounts {
  int32_t* of;
  int num_experts;

  // A barrier ends it.
  __device__ void clear() const {
    each([&](int e) { of[e] = 0; });
    __syncthreads();
  }
  __device__ void count(int expert) const { atomic_add(&of[expert], 1); }
  // A barrier begins it.
  __device__ void add_to(int32_t* tokens_per_expert) const {
    __syncthreads();
    each([&](int e) {
      if (of[e] != 0) atomic_add(&tokens_per_expert[e], of[e]);
    });
  }

 private:
  template <class Visit>
  __device__ void each(Visit visit) const {
    const int threads = static_cast<int>(blockDim.x);
    for (int e = static_cast<int>(threadIdx.x); e < num_experts; e += threads) visit(e);
  }
};

}  // namespace kimi::gate
