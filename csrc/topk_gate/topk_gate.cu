// SPDX-License-Identifier: MIT
// The gate on CUDA (any sm_80+): one warp a token, logits read once, everything in registers.
//
//   token   choose.cuh
//   counts  a histogram for each block in shared memory, then integer atomics: any order, same sum
//
// Predicted for an H200 (4.2 TB/s; 132 SMs at 1.75 GHz, 4 warp instructions a clock):
//   32768 x 384 fp32, top 8, sigmoid: 50 MB, 12 us by bytes. SASS for sm_80 has 59 instructions for
//   each of the warp's 12 x 32 logits (12 load and clean it, 32 score it, 5 make the key, 10 keep
//   the best two); with about 350 for the rest of a token: 35 M warp instructions, 37 us:
//   issue-bound. An H100 takes 59 us in a graph: 2.9 instructions a clock, 1225 a token.
//   Two-byte logits are loaded one by one: in pairs a lane would own neighbours, and softmax would
//   sum in another order than the other engines.
#include <algorithm>
#include <cstdint>

#include "device/atomic.cuh"
#include "topk_gate/choose.cuh"

namespace kimi {
namespace {

using namespace gate;

// ---- forward -----------------------------------------------------------------------------------

// Blocks of a multiprocessor that the registers must leave room for.
constexpr int least_blocks(int values) { return values <= 8 ? 4 : values <= 16 ? 3 : 2; }

// kValues * 32 >= E. Dynamic shared memory: int32 histogram [E]; with groups, for each warp keys
// [E] and group keys [num_groups].
template <class T, int kValues>
__global__ void __launch_bounds__(kWarps* kWarpSize, least_blocks(kValues))
    topk_gate_kernel(const __grid_constant__ TopkGateParams p) {
  constexpr bool kBiasInRegisters = kValues <= 12;  // beyond, they would cost resident warps
  KIMI_SHARED(int32_t, histogram);
  const int lane = lane_id(), num_experts = p.num_experts;
  // Without a bias + 0 changes nothing, and there is no branch between the experts.
  const auto bias_of = [&, has_bias = p.expert_bias != nullptr](int e) {
    return has_bias && e < num_experts ? p.expert_bias[e] : 0.0f;
  };
  float bias[kBiasInRegisters ? kValues : 1];
  if constexpr (kBiasInRegisters)
#pragma unroll
    for (int j = 0; j < kValues; ++j) bias[j] = bias_of(lane + 32 * j);
  int32_t* keys = histogram + num_experts + warp_id() * (num_experts + p.num_groups);
  for (int e = static_cast<int>(threadIdx.x); e < num_experts; e += static_cast<int>(blockDim.x))
    histogram[e] = 0;
  __syncthreads();

  const int64_t stride = int64_t{gridDim.x} * kWarps;
  for (int64_t t = int64_t{blockIdx.x} * kWarps + warp_id(); t < p.num_tokens; t += stride) {
    float* weights = p.weights + t * p.top_k;
    int32_t* indices = p.indices + t * p.top_k;
    if (p.valid && !p.valid[t]) {
      if (lane < p.top_k) weights[lane] = 0.0f;
      if (lane < p.top_k) indices[lane] = -1;
      continue;
    }
    const T* logits = static_cast<const T*>(p.logits) + t * p.logits_stride;
    const Choice mine = choose<T, kValues>(
        p, logits,
        [&](int j) {
          return kBiasInRegisters ? bias[kBiasInRegisters ? j : 0] : bias_of(lane + 32 * j);
        },
        keys);
    if (lane < p.top_k) {
      weights[lane] = mine.weight;
      indices[lane] = mine.expert;
      atomic_add(&histogram[mine.expert], 1);
    }
  }

  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < num_experts; e += static_cast<int>(blockDim.x))
    if (histogram[e] != 0) atomic_add(&p.tokens_per_expert[e], histogram[e]);
}

// ---- launcher ----------------------------------------------------------------------------------

// The smallest kernel that holds a row: 2, 8, 12, 28 values a lane are 64, 256, 384, 896 experts.
template <class T, int kValues, int... kLarger>
Status launch_smallest(const TopkGateParams& p, size_t smem_bytes, void* stream) {
  if constexpr (sizeof...(kLarger) > 0)
    if (p.num_experts > kValues * kWarpSize)
      return launch_smallest<T, kLarger...>(p, smem_bytes, stream);
  return launch_warp_per_token(topk_gate_kernel<T, kValues>, p, smem_bytes, stream);
}

}  // namespace

Status topk_gate_cuda(const TopkGateParams& p, void* stream) {
  const size_t histogram = sizeof(int32_t) * static_cast<size_t>(p.num_experts);
  KIMI_RETURN_IF_ERROR(memset_async(p.tokens_per_expert, 0, histogram, stream));
  if (p.num_tokens == 0) return Status::ok();
  const size_t keys =
      p.num_groups > 1 ? sizeof(int32_t) * kWarps * (p.num_experts + p.num_groups) : 0;
  return dispatch(p.logits_dtype, [&]<class T>() {
    return launch_smallest<T, 2, 4, 8, 12, 16, 28, 32>(p, histogram + keys, stream);
  });
}

}  // namespace kimi
