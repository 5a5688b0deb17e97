// SPDX-License-Identifier: MIT
// The gate on CUDA (any sm_80+): one warp a token, logits read once, everything in registers.
//
//   token   choose.cuh
//   counts  counts.cuh
//   few     one launch without a memset: gate_plan.cuh
//
// *Predicted*, not measured. SASS for sm_90 on the way of nearly every row, counted for fp32, sigmoid
// and a bias, warp instructions a token:
//
//                              384, top 8    896, top 16
//   row, bias                          52            100
//   estimates, 5 each                  64            140
//   lanes' largest; tau            25, 46        120, 92
//   band, ballots, ids            86, 29        106, 35       of 8.9 and 16.5 candidates a row (4096
//   exact scores, slots               158            184       normal rows; not one of them exact)
//   sum, weights, stores              108            126
//   in all                            568            903
//
// On an H100, where the kernel before took 59 and 236 us in a graph with 1225 instructions at 2.9 a
// clock and fewer warps at hand: 27 and 50 us for 32768 tokens, of which bytes are 18 and 42.
#include <algorithm>
#include <cstdint>

#include "topk_gate/choose.cuh"
#include "topk_gate/counts.cuh"
#include "topk_gate/gate_plan.h"

namespace kimi {
namespace {

using namespace gate;

// ---- forward -----------------------------------------------------------------------------------

// Blocks of a multiprocessor that the registers must leave room for.
constexpr int least_blocks(int values) { return values <= 16 ? 4 : 3; }

// kValues * 32 >= E. Dynamic shared memory: int32 histogram [E]; for each warp keys [E] and group
// keys [num_groups].
template <class T, int kValues>
__global__ void __launch_bounds__(kWarps* kWarpSize, least_blocks(kValues))
    topk_gate_kernel(const __grid_constant__ TopkGateParams p) {
  constexpr bool kBiasInRegisters = kValues <= 12;  // beyond, they would cost resident warps
  KIMI_SHARED(int32_t, histogram);
  KIMI_STATIC_SHARED(Board, boards, kWarps);
  const int lane = lane_id(), num_experts = p.num_experts;
  const Layout layout = layout_of<T>(p);
  float bias[kBiasInRegisters ? kValues : 1];
  if constexpr (kBiasInRegisters) load_bias_row(p, layout, bias);
  const auto load_bias = [&](float (&b)[kValues]) {
    if constexpr (kBiasInRegisters) {
#pragma unroll
      for (int j = 0; j < kValues; ++j) b[j] = bias[j];
    } else {
      load_bias_row(p, layout, b);
    }
  };
  int32_t* keys = histogram + num_experts + warp_id() * (num_experts + p.num_groups);
  const BlockCounts counts{histogram, num_experts};
  counts.clear();

  const int64_t stride = int64_t{gridDim.x} * kWarps;
  for (int64_t t = int64_t{blockIdx.x} * kWarps + warp_id(); t < p.num_tokens; t += stride) {
    const int64_t slot = t * p.top_k + lane;
    if (p.valid && !p.valid[t]) {
      if (lane < p.top_k) p.weights[slot] = 0.0f;
      if (lane < p.top_k) p.indices[slot] = -1;
      continue;
    }
    const T* logits = static_cast<const T*>(p.logits) + t * p.logits_stride;
    const Choice mine = choose<T, kValues>(p, logits, layout, load_bias, boards[warp_id()], keys);
    if (lane < p.top_k) {
      p.weights[slot] = mine.weight;
      p.indices[slot] = mine.expert;
      counts.count(mine.expert);
    }
  }

  counts.add_to(p.tokens_per_expert);
}

// ---- launcher ----------------------------------------------------------------------------------

// The smallest kernel that holds a row: 8, 12, 28 values a lane are 256, 384, 896 experts.
template <class T, int kValues, int... kLarger>
Status launch_smallest(const TopkGateParams& p, size_t smem_bytes, void* stream) {
  if constexpr (sizeof...(kLarger) > 0)
    if (p.num_experts > kValues * kWarpSize)
      return launch_smallest<T, kLarger...>(p, smem_bytes, stream);
  return launch_warp_per_token(topk_gate_kernel<T, kValues>, p, smem_bytes, stream);
}

}  // namespace

Status topk_gate_cuda(const TopkGateParams& p, void* stream) {
  GatePlanParams alone{};
  alone.gate = p;
  bool launched = false;
  KIMI_RETURN_IF_ERROR(launch_few(alone, launched, stream));
  if (launched) return Status::ok();
  const size_t histogram = sizeof(int32_t) * static_cast<size_t>(p.num_experts);
  KIMI_RETURN_IF_ERROR(memset_async(p.tokens_per_expert, 0, histogram, stream));
  const size_t keys = sizeof(int32_t) * kWarps * (p.num_experts + p.num_groups);
  return dispatch(p.logits_dtype, [&]<class T>() {
    return launch_smallest<T, 4, 8, 12, 16, 28, 32>(p, histogram + keys, stream);
  });
}

}  // namespace kimi
