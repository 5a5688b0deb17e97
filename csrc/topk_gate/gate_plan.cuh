// SPDX-License-Identifier: MIT
// The gate of few tokens in one launch, with the plan or without: one warp a token, 16 tokens a
// block; on Hopper up to four blocks, a cluster.
//
//   warp w   its token's experts and weights      choose.cuh
//            bit w of mask[expert]                shared memory, [E]: K bits a token
//   block    before[e], total[e]                  bits of the cluster's masks, its own last
//            start[e]                             scan of the totals
//   warp w   row = start[e] + before[e] + bits of mask[e] below w
//
// A token's ids differ, so a mask says all there is to say about an expert, in any order of arrival.
//
// *Predicted* for a token of K2 (E 384, K 8) at 1.9 GHz: logits 700 clocks, 570 instructions of one
// warp 1300, masks and scan 500, stores 300: 1.5 us beside the 1.9 us of a launch, against the 6.6
// and 4.6 us in a graph that an H100 took for memset, gate and plan; 64 tokens in a cluster 2.1 us
// beside it. One block would issue their instructions for 12 000 clocks.
#pragma once

#include <algorithm>
#include <cstdint>

#include "device/atomic.cuh"
#include "device/cluster.cuh"
#include "device/overlap.cuh"
#include "permute/permute.cuh"
#include "topk_gate/choose.cuh"
#include "topk_gate/gate_plan.h"

namespace kimi::gate {
namespace {  // each architecture's file has its own

constexpr int kPlanWarps = 16, kPlanThreads = kPlanWarps * kWarpSize;
constexpr unsigned kPlanBlocks = 4;  // of a cluster

// kValues * 32 >= E. Dynamic shared memory: masks [E], base [E]; for each warp keys [E] and group keys
// [num_groups].
template <class T, int kValues, bool kCluster>
__global__ void __launch_bounds__(kPlanThreads, 1)
    gate_plan_kernel(const __grid_constant__ GatePlanParams all) {
  const TopkGateParams& p = all.gate;
  KIMI_SHARED(uint32_t, masks);
  KIMI_STATIC_SHARED(int32_t, warp_sums, kPlanWarps);
  KIMI_STATIC_SHARED(Board, boards, kPlanWarps);
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id(), warp = warp_id();
  const int num_experts = p.num_experts, top_k = p.top_k;
  const int rank = kCluster ? cluster_rank() : 0, blocks = kCluster ? cluster_blocks() : 1;
  int32_t* const base = reinterpret_cast<int32_t*>(masks + num_experts);
  int32_t* const keys = base + num_experts + warp * (num_experts + p.num_groups);
  const auto meet = [] {
    if constexpr (kCluster) {
      cluster_arrive();
      cluster_wait();
    } else {
      __syncthreads();
    }
  };
  for (int e = thread; e < num_experts; e += kPlanThreads) masks[e] = 0;
  __syncthreads();
  wait_for_previous();
  let_next_start();

  const int64_t t = int64_t{rank} * kPlanWarps + warp, pair = t * top_k + lane;
  const bool mine = t < p.num_tokens && lane < top_k;
  Choice choice{-1, 0.0f};
  if (t < p.num_tokens && (p.valid == nullptr || p.valid[t])) {
    const Layout layout = layout_of<T>(p);
    choice = choose<T, kValues>(
        p, static_cast<const T*>(p.logits) + t * p.logits_stride, layout,
        [&](float (&bias)[kValues]) { load_bias_row(p, layout, bias); }, boards[warp], keys);
  }
  if (mine) {
    p.weights[pair] = choice.weight;
    p.indices[pair] = choice.expert;
    if (choice.expert >= 0) atomic_or(&masks[choice.expert], 1u << warp);
  }
  meet();

  const bool plan = all.offsets != nullptr;
  int32_t num_rows = 0;  // carries from one round of experts to the next
  for (int round = 0; round < num_experts; round += kPlanThreads) {
    const int expert = round + thread;
    const bool inside = expert < num_experts;
    int32_t before = 0, total = 0;  // pairs of the earlier blocks; of all
    for (int r = 0; inside && r < blocks; ++r) {
      const uint32_t mask = r == rank ? masks[expert] : load_in(masks + expert, r);
      if (r == rank) before = total;
      total += __popc(mask);
    }
    if (inside && rank == 0) p.tokens_per_expert[expert] = total;
    if (!plan) continue;
    const int32_t start = permutation::block_exclusive_sum<kPlanWarps>(total, warp_sums, num_rows);
    if (!inside) continue;
    base[expert] = start + before;
    if (rank == 0) all.offsets[expert] = start + total;
  }
  __syncthreads();

  if (plan && mine) {
    int32_t row = -1;
    if (choice.expert >= 0)
      row = base[choice.expert] + __popc(masks[choice.expert] & ((1u << warp) - 1));
    all.row_map[pair] = row;
    if (row >= 0) all.source[row] = static_cast<int32_t>(pair);
  }
  // Dropped pairs leave rows over.
  const int64_t num_pairs = plan ? p.num_tokens * top_k : 0;
  for (int64_t row = int64_t{num_rows} + rank * kPlanThreads + thread; row < num_pairs;
       row += int64_t{blocks} * kPlanThreads)
    all.source[row] = -1;
  if constexpr (kCluster) meet();  // another block may still read this one's masks
}

// At most kPlanWarps tokens, kPlanBlocks times as many in a cluster.
template <bool kCluster>
Status launch_gate_plan(const GatePlanParams& p, size_t smem_bytes, void* stream) {
  const unsigned blocks = static_cast<unsigned>(
      std::max<int64_t>(1, (p.gate.num_tokens + kPlanWarps - 1) / kPlanWarps));
  LaunchConfig config{dim3(blocks), dim3(kPlanThreads), smem_bytes, stream};
  config.cluster = blocks;
  config.overlaps = kCluster;
  return dispatch(p.gate.logits_dtype, [&]<class T>() {
    if (p.gate.num_experts <= 12 * kWarpSize)
      return launch(gate_plan_kernel<T, 12, kCluster>, config, p);
    return launch(gate_plan_kernel<T, 32, kCluster>, config, p);
  });
}

}  // namespace
}  // namespace kimi::gate
