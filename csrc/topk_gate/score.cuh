// SPDX-License-Identifier: MIT
// What the gate's CUDA kernels share: the arithmetic of score.h on a GPU, the scores of a row that
// a warp holds (lane l owns experts l, l+32, ...), and the launch shape of one warp a token.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cstdint>

#include "device/launch.cuh"
#include "device/ops.cuh"
#include "device/warp.cuh"
#include "topk_gate/score.h"
#include "topk_gate/topk_gate.h"

namespace kimi::gate {

inline constexpr int kWarps = 8;  // of a block

// What softmax needs to know of the whole row; nothing for the other score functions.
struct RowScale {
  float peak = 0.0f, factor = 1.0f;
};

// Calls visit(score_of), where score_of(z) is the score of a cleaned logit: the choice of the
// function stays outside of the visitor's loops.
template <class Visitor>
__device__ inline void with_score(kimi_score_function function, RowScale row, Visitor visit) {
  if (function == KIMI_SCORE_SIGMOID)
    visit([](float z) { return math::sigmoid<CudaOps>(z); });
  else if (function == KIMI_SCORE_SQRTSOFTPLUS)
    visit([](float z) { return sqrtsoftplus<CudaOps>(z); });
  else
    visit([=](float z) { return mul_rn(softmax_numerator<CudaOps>(z, row.peak), row.factor); });
}

__device__ inline float score(float z, kimi_score_function function, RowScale row) {
  float s = 0.0f;
  with_score(function, row, [&](auto score_of) { s = score_of(z); });
  return s;
}

// From every lane's largest logit and a function that sums its numerators for a given peak.
template <class SumNumerators>
__device__ inline RowScale softmax_scale(float largest, SumNumerators sum_numerators) {
  RowScale row;
  row.peak = value_of_key(warp_max(sort_key(largest)));
  float sum = sum_numerators(row.peak);
#pragma unroll
  for (int half = 16; half > 0; half /= 2) sum = add_rn(sum, warp_exchange(sum, half));
  row.factor = sum > 0.0f ? div_rn(1.0f, sum) : 0.0f;
  return row;
}

// What softmax needs of a row, logit(e) being the cleaned logit of expert e < num_experts.
template <class Logit>
__device__ inline RowScale softmax_scale_of(int num_experts, Logit logit) {
  float largest = -FLT_MAX;
  for (int e = lane_id(); e < num_experts; e += kWarpSize) largest = fmaxf(largest, logit(e));
  return softmax_scale(largest, [&](float peak) {
    float sum = 0.0f;
    for (int e = lane_id(); e < num_experts; e += kWarpSize)
      sum = add_rn(sum, softmax_numerator<CudaOps>(logit(e), peak));
    return sum;
  });
}

// A grid that the device holds at once; warps go on to further tokens by themselves.
template <class Params>
Status launch_warp_per_token(void (*kernel)(Params), const Params& p, size_t smem_bytes,
                             void* stream) {
  constexpr int kThreads = kWarps * kWarpSize;
  const int64_t blocks = (p.num_tokens + kWarps - 1) / kWarps;
  const int64_t resident = resident_blocks(kernel, kThreads, smem_bytes);
  const dim3 grid(static_cast<unsigned>(std::min(blocks, resident)));
  return launch(kernel, LaunchConfig{grid, dim3(kThreads), smem_bytes, stream}, p);
}

}  // namespace kimi::gate
