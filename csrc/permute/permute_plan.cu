// SPDX-License-Identifier: MIT
// The plan on CUDA (any sm_80+; on Hopper beyond what a cluster takes, permute_plan_sm90.cu): a stable
// counting sort of the pairs by expert, in two launches, or one for few pairs.
//
//   pairs   0 ......... | block 0: warp 0 | warp 1 | ... | block 1: warp 0 | ...     runs, in order
//   first   counts[b][e]  of block b's run, to the workspace         (not where one block does all)
//   second  each block: start of e's group   scan of the padded totals over all experts
//                       + earlier blocks     column sum of counts
//                       + earlier warps      counts of the block's own warps, in shared memory
//                       + earlier lanes      match.any and the lanes below
//           then row_map[pair] and source[row] of its own pairs; a warp's counts run on
//
// source is written once and without a memset: what no pair owns are the ends of the groups, which
// the blocks share out by expert, and the tail behind the last group. A memset would write the
// pairs' places twice, and at decode be a second node in a graph where there is one.
//
// Cost: 4 N read twice (the second time from L2), 8 N + 8 E written, N = T K; each block reads
// 4 B E bytes of counts from L2, B <= 128 blocks. Latency alone; on an H100, in a graph: 4.6 us for
// 8 pairs, 9.5 us for 32768 of 384 experts (3 and 5 were predicted), 31 us for 131072 of 896.
#include <algorithm>
#include <cstdint>

#include "device/atomic.cuh"
#include "permute/permute.cuh"
#include "permute/permute.h"

namespace kimi {
namespace {

using namespace permutation;

constexpr int kWarps = 16, kThreads = kWarps * kWarpSize;
constexpr int64_t kPairsOfOneBlock = 4096;  // up to here one launch (predicted: faster than two)
constexpr int64_t kPairsPerBlock = 1024;    // at least, where there are more
constexpr int64_t kMaxBlocks = 128;         // keeps the column sums short

struct PlanArguments : PermutePlanParams {
  int64_t num_pairs, num_rows;  // N, R
  int64_t pairs_per_warp;       // a multiple of 32
};

PlanArguments arguments_of(const PermutePlanParams& p) {
  PlanArguments a{p, 0, 0, 0};
  a.num_pairs = p.num_tokens * p.top_k;
  a.num_rows = a.num_pairs + int64_t{p.num_experts} * (p.align - 1);
  const int64_t wanted =
      a.num_pairs <= kPairsOfOneBlock ? 1 : std::min(kMaxBlocks, a.num_pairs / kPairsPerBlock);
  const int64_t chunk = wanted * kWarps * kWarpSize;
  a.pairs_per_warp = std::max<int64_t>(1, (a.num_pairs + chunk - 1) / chunk) * kWarpSize;
  return a;
}

int64_t num_blocks(const PlanArguments& a) {
  const int64_t pairs_per_block = a.pairs_per_warp * kWarps;
  return std::max<int64_t>(1, (a.num_pairs + pairs_per_block - 1) / pairs_per_block);
}

// The expert of a pair; -1 past the end and for any id that is none.
__device__ inline int32_t expert_of(const PlanArguments& p, int64_t pair, int64_t end) {
  if (pair >= end) return -1;
  const int32_t id = p.indices[pair];
  return id < p.num_experts && id >= 0 ? id : -1;
}

// Dynamic shared memory: counts [E].
__global__ void __launch_bounds__(kThreads)
    count_pairs_kernel(const __grid_constant__ PlanArguments p) {
  KIMI_SHARED(int32_t, counts);
  const int thread = static_cast<int>(threadIdx.x);
  for (int e = thread; e < p.num_experts; e += kThreads) counts[e] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * kWarps * p.pairs_per_warp;
  const int64_t end = std::min(begin + kWarps * p.pairs_per_warp, p.num_pairs);
#pragma unroll 4
  for (int64_t pair = begin + thread; pair < end; pair += kThreads)
    if (const int32_t e = expert_of(p, pair, end); e >= 0) atomic_add(&counts[e], 1);
  __syncthreads();
  int32_t* out = static_cast<int32_t*>(p.workspace) + int64_t{blockIdx.x} * p.num_experts;
  for (int e = thread; e < p.num_experts; e += kThreads) out[e] = counts[e];
}

// Dynamic shared memory: next [kWarps][E], first the pairs of each warp, then the row of its next
// pair; ends [2][E], of each group's pairs and of its padding.
__global__ void __launch_bounds__(kThreads)
    place_pairs_kernel(const __grid_constant__ PlanArguments p) {
  KIMI_SHARED(int32_t, next);
  KIMI_STATIC_SHARED(int32_t, warp_sums, kWarps);
  const int num_experts = p.num_experts, thread = static_cast<int>(threadIdx.x);
  int32_t* mine = next + warp_id() * num_experts;
  int32_t* pairs_end = next + kWarps * num_experts;
  int32_t* group_end = pairs_end + num_experts;
  const int64_t begin = (int64_t{blockIdx.x} * kWarps + warp_id()) * p.pairs_per_warp;
  const int64_t end = std::min(begin + p.pairs_per_warp, p.num_pairs);

  // Loaded ahead of need; where a warp has 32 pairs at most, for both passes.
  const int32_t first = expert_of(p, begin + lane_id(), end);
  for (int i = thread; i < kWarps * num_experts; i += kThreads) next[i] = 0;
  __syncthreads();
  int32_t e = first;
  for (int64_t at = begin + lane_id(); at < end; at += kWarpSize) {
    if (e >= 0) atomic_add(&mine[e], 1);
    e = expert_of(p, at + kWarpSize, end);
  }
  __syncthreads();

  int32_t group_start = 0;  // carries from one round of experts to the next
  for (int round = 0; round < num_experts; round += kThreads) {
    const int expert = round + thread;
    const bool inside = expert < num_experts;
    int32_t before = 0, total = 0;  // pairs of the earlier blocks; of all
    if (inside && gridDim.x > 1) {
      const int32_t* counts = static_cast<const int32_t*>(p.workspace) + expert;
#pragma unroll 16
      for (unsigned b = 0; b < gridDim.x; ++b) {
        const int32_t count = counts[b * num_experts];
        total += count;
        if (b < blockIdx.x) before += count;
      }
    } else if (inside) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += next[w * num_experts + expert];
    }
    const int32_t padded = (total + p.align - 1) / p.align * p.align;
    const int32_t start = block_exclusive_sum<kWarps>(padded, warp_sums, group_start);
    if (!inside) continue;
    pairs_end[expert] = start + total;
    group_end[expert] = start + padded;
    int32_t row = start + before;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int32_t count = next[w * num_experts + expert];
      next[w * num_experts + expert] = row;
      row += count;
    }
    if (blockIdx.x != 0) continue;
    p.offsets[expert] = start + padded;
    p.tokens_per_expert[expert] = total;
  }
  __syncthreads();

  e = first;
  const uint32_t lanes_below = (1u << lane_id()) - 1;
  for (int64_t at = begin; at < end; at += kWarpSize) {
    const int64_t pair = at + lane_id();
    const int32_t following = expert_of(p, pair + kWarpSize, end);
    const uint32_t same = warp_match(e);
    int32_t row = -1;
    if (e >= 0) row = mine[e] + __popc(same & lanes_below);
    warp_barrier();  // every lane has read before the count runs on
    if (e >= 0 && (same & lanes_below) == 0) mine[e] = row + __popc(same);
    warp_barrier();
    if (pair < end) p.row_map[pair] = row;
    if (row >= 0) p.source[row] = static_cast<int32_t>(pair);
    e = following;
  }

  const int warp = static_cast<int>(blockIdx.x) * kWarps + warp_id();
  for (int i = warp; i < num_experts; i += static_cast<int>(gridDim.x) * kWarps)
    for (int64_t row = pairs_end[i] + lane_id(); row < group_end[i]; row += kWarpSize)
      p.source[row] = -1;
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t row = group_start + int64_t{blockIdx.x} * kThreads + thread; row < p.num_rows;
       row += step)
    p.source[row] = -1;
}

}  // namespace

size_t permute_plan_workspace_bytes_cuda(const PermutePlanParams& p) {
  const int64_t blocks = num_blocks(arguments_of(p));
  const int64_t counts = blocks > 1 ? blocks * p.num_experts : 0;
  return std::max<size_t>(16, sizeof(int32_t) * static_cast<size_t>(counts));
}

Status permute_plan_cuda(const PermutePlanParams& p, void* stream) {
  int sm = 0;
  KIMI_RETURN_IF_ERROR(device_sm(sm));
  if (sm / 10 == 9 && p.num_tokens * p.top_k <= kPlanOfCluster) return permute_plan_sm90(p, stream);
  const PlanArguments a = arguments_of(p);
  const dim3 grid(static_cast<unsigned>(num_blocks(a)));
  const size_t row = sizeof(int32_t) * static_cast<size_t>(p.num_experts);
  if (grid.x > 1)
    KIMI_RETURN_IF_ERROR(
        launch(count_pairs_kernel, LaunchConfig{grid, dim3(kThreads), row, stream}, a));
  return launch(place_pairs_kernel, LaunchConfig{grid, dim3(kThreads), (kWarps + 2) * row, stream},
                a);
}

}  // namespace kimi
