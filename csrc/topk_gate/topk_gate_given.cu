// SPDX-License-Identifier: MIT
// Weights of given experts on CUDA (any sm_80+): one warp a token.
//
//   lane k < K   slot k: fetches its logit and scores it; the sum goes by broadcasts in slot order
//   softmax      reads the row twice before, for its peak and its sum
//   counts       counts.cuh
//
// Predicted for an H200, not measured: 32768 tokens, K 8, sigmoid: 4 MB of ids, weights and logits by
// sectors of 32 bytes, about 60 warp instructions a token: 8 us, half of it the launch and the memset.
#include <cstdint>

#include "common/dtype.h"
#include "topk_gate/counts.cuh"

namespace kimi {
namespace {

using namespace gate;

// Dynamic shared memory: int32 histogram [E].
template <class T>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    topk_gate_given_kernel(const __grid_constant__ TopkGateGivenParams p) {
  KIMI_SHARED(int32_t, histogram);
  const int lane = lane_id(), num_experts = p.num_experts;
  const BlockCounts counts{histogram, num_experts};
  counts.clear();
  const int64_t stride = int64_t{gridDim.x} * kWarps;
  for (int64_t t = int64_t{blockIdx.x} * kWarps + warp_id(); t < p.num_tokens; t += stride) {
    const T* logits = static_cast<const T*>(p.logits) + t * p.logits_stride;
    const auto logit = [&](int e) { return clean<CudaOps>(to_float(logits[e])); };
    const bool mine = lane < p.top_k && (p.valid == nullptr || p.valid[t]);
    const int id = mine ? p.given[t * p.top_k + lane] : -1;
    const bool slot = static_cast<uint32_t>(id) < static_cast<uint32_t>(num_experts);
    RowScale row;
    if (p.score_function == KIMI_SCORE_SOFTMAX && warp_ballot(slot) != 0)
      row = softmax_scale_of(num_experts, logit);
    const float u = slot ? score(logit(id), p.score_function, row) : 0.0f;
    float total = 0.0f;
    for (int k = 0; k < p.top_k; ++k) total = add_rn(total, warp_broadcast(u, k));
    const float scale = p.renormalize
                            ? div_rn(p.scaling_factor, add_rn(total, KIMI_TOPK_GATE_EPSILON))
                            : p.scaling_factor;
    if (lane < p.top_k) {
      p.weights[t * p.top_k + lane] = mul_rn(u, scale);
      p.indices[t * p.top_k + lane] = slot ? id : -1;
    }
    if (slot) counts.count(id);
  }
  counts.add_to(p.tokens_per_expert);
}

}  // namespace

Status topk_gate_given_cuda(const TopkGateGivenParams& p, void* stream) {
  const size_t histogram = sizeof(int32_t) * static_cast<size_t>(p.num_experts);
  KIMI_RETURN_IF_ERROR(memset_async(p.tokens_per_expert, 0, histogram, stream));
  if (p.num_tokens == 0) return Status::ok();
  return dispatch(p.logits_dtype, [&]<class T>() {
    return launch_warp_per_token(topk_gate_given_kernel<T>, p, histogram, stream);
  });
}

}  // namespace kimi
