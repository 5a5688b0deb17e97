// SPDX-License-Identifier: MIT
// The plan on Hopper, up to 131072 pairs: one launch of one cluster, or a block where that does.
//
//   pairs    0 ....... | block 0: warp 0 | warp 1 | ... | block 1: warp 0 | ...     runs, in order
//   warp     32 pairs at a time: match.any counts those of the pair's expert before it, which stays
//            in a register; counts[warp][e] run on
//   block    prefix of counts over the warps, two experts a word; sums[e]
//   cluster  reads all blocks' sums[e]; a scan over the experts gives every group's first row and
//            where the block's own pairs of e begin once they are sorted
//   block    sorts its pairs by expert in shared memory, so that `source` is written in runs
//
// *Predicted* for an H100 at 1.9 GHz, not measured, in clocks, beside the 1.9 us of a launch:
//
//                                     4096 x 8 of 384    8192 x 16 of 896
//   ids, all in flight                            900                1200
//   32 pairs of a warp, 120 each                  480                1900
//   prefix over warps                             350                 400
//   cluster, its sums, scan                       750                 750
//   rows and sorting                              800                2000
//   source, in runs                               600                1500
//   in all                        3900: 2.1 + 1.9 us    7800: 4.1 + 1.9 us    (9.5 and 31 us measured
//   for the two launches of permute_plan.cu in a graph)
#include <algorithm>
#include <cstdint>

#include "device/clock.cuh"
#include "device/cluster.cuh"
#include "device/overlap.cuh"
#include "permute/permute.cuh"
#include "permute/permute.h"

namespace kimi::permutation {
namespace {

constexpr int kWarps = 32, kThreads = kWarps * kWarpSize;
constexpr int kBlocks = 8;                  // of a cluster
constexpr int kRounds = 16;                 // of 32 pairs, of a warp
constexpr int64_t kPairsOfOneBlock = 4096;  // up to here no cluster
static_assert(kPlanOfCluster == kBlocks * kThreads * kRounds);
static_assert(KIMI_PERMUTE_MAX_EXPERTS <= kThreads);

struct ClusterPlan : PermutePlanParams {
  int64_t num_rows;
  int32_t num_pairs, pairs_per_warp;  // the second a multiple of 32
};

// A block's shared memory, in this order.
struct Shared {
  uint32_t* sums;    // [E], even: of the block's pairs; read by the cluster
  int32_t* place;    // [E] of the block's first pair of e among its sorted ones
  int32_t* shift;    // [E] from there to its row
  int32_t* ends;     // [2][E] of a group's pairs, and of its padding
  uint16_t* counts;  // [kWarps][E], even: pairs of a warp, then those of the earlier warps
  int32_t* pairs;    // [kWarps * pairs_per_warp], sorted
  int32_t* rows;     // [kWarps * pairs_per_warp], theirs
};

__host__ __device__ inline int even(int experts) { return (experts + 1) / 2 * 2; }

size_t shared_bytes(const ClusterPlan& p) {
  const size_t experts = static_cast<size_t>(even(p.num_experts));
  return experts * (5 * sizeof(int32_t) + kWarps * sizeof(uint16_t)) +
         2 * sizeof(int32_t) * static_cast<size_t>(kWarps * p.pairs_per_warp);
}

__device__ inline Shared shared_of(uint32_t* memory, const ClusterPlan& p) {
  const int experts = even(p.num_experts);
  Shared s;
  s.sums = memory;
  s.place = reinterpret_cast<int32_t*>(memory + experts);
  s.shift = s.place + experts;
  s.ends = s.shift + experts;
  s.counts = reinterpret_cast<uint16_t*>(s.ends + 2 * experts);
  s.pairs = reinterpret_cast<int32_t*>(s.counts + kWarps * experts);
  s.rows = s.pairs + kWarps * p.pairs_per_warp;
  return s;
}

// counts [kWarps][E] become those of the earlier warps, sums [E] those of all. A word holds two
// experts: no sum of a block passes 2^16.
__device__ inline void sum_warps(const Shared& s, int experts) {
  const int words = even(experts) / 2;
  for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads) {
    uint32_t* column = reinterpret_cast<uint32_t*>(s.counts) + i;
    uint32_t total = 0;
#pragma unroll 16
    for (int w = 0; w < kWarps; ++w) {
      const uint32_t count = column[w * words];
      column[w * words] = total;
      total += count;
    }
    s.sums[2 * i] = total & 0xffffu;
    s.sums[2 * i + 1] = total >> 16;
  }
}

__global__ void __launch_bounds__(kThreads)
    plan_in_cluster_kernel(const __grid_constant__ ClusterPlan p) {
  KIMI_SHARED(uint32_t, memory);
  KIMI_STATIC_SHARED(int64_t, warp_sums, kWarps);
  const Shared s = shared_of(memory, p);
  const int thread = static_cast<int>(threadIdx.x), num_experts = p.num_experts;
  const int rank = cluster_rank(), blocks = cluster_blocks();
  clock_mark(0);
  uint16_t* counts = s.counts + warp_id() * even(num_experts);
  for (int i = thread; i < kWarps * even(num_experts) / 2; i += kThreads)
    reinterpret_cast<uint32_t*>(s.counts)[i] = 0;
  __syncthreads();
  wait_for_previous();
  let_next_start();
  clock_mark(1);

  const int32_t begin = (rank * kWarps + warp_id()) * p.pairs_per_warp + lane_id();
  // Of the pair: its expert; above it, how many of the expert's are before it in the warp; or -1.
  int32_t found[kRounds];
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int32_t pair = begin + r * kWarpSize;
    found[r] = -1;
    if (r * kWarpSize >= p.pairs_per_warp || pair >= p.num_pairs) continue;
    const int32_t id = p.indices[pair];
    found[r] = id >= 0 && id < num_experts ? id : -1;
  }
  const uint32_t lanes_below = (1u << lane_id()) - 1;
#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    if (r * kWarpSize >= p.pairs_per_warp) break;
    const int32_t e = found[r];
    const uint32_t same = warp_match(e);
    const int earlier = e >= 0 ? counts[e] : 0;
    warp_barrier();  // every lane has read before the count runs on
    if (e >= 0) {
      found[r] = (earlier + __popc(same & lanes_below)) << 16 | e;
      if ((same & lanes_below) == 0) counts[e] = static_cast<uint16_t>(earlier + __popc(same));
    }
    warp_barrier();
  }
  clock_mark(2);
  __syncthreads();
  sum_warps(s, num_experts);
  clock_mark(3);
  cluster_arrive();
  cluster_wait();
  clock_mark(4);

  int32_t earlier = 0, total = 0, own = 0;  // pairs of the earlier blocks, of all, of this one
  if (thread < num_experts) {
#pragma unroll
    for (int b = 0; b < kBlocks; ++b) {
      if (b >= blocks) break;
      const int32_t count =
          static_cast<int32_t>(b == rank ? s.sums[thread] : load_in(s.sums + thread, b));
      if (b == rank) own = count;
      if (b < rank) earlier += count;
      total += count;
    }
  }
  cluster_arrive();  // no more of other blocks' memory is read
  const int32_t padded = (total + p.align - 1) / p.align * p.align;
  int64_t all = 0;  // rows in the lower half, the block's own pairs above
  const int64_t start = block_exclusive_sum<kWarps>(int64_t{own} << 32 | padded, warp_sums, all);
  const int32_t num_own = static_cast<int32_t>(all >> 32);
  clock_mark(5);
  if (thread < num_experts) {
    const int32_t first = static_cast<int32_t>(start), place = static_cast<int32_t>(start >> 32);
    s.place[thread] = place;
    s.shift[thread] = first + earlier - place;
    s.ends[thread] = first + total;
    s.ends[num_experts + thread] = first + padded;
    if (rank == 0) {
      p.offsets[thread] = first + padded;
      p.tokens_per_expert[thread] = total;
    }
  }
  __syncthreads();

#pragma unroll
  for (int r = 0; r < kRounds; ++r) {
    const int32_t pair = begin + r * kWarpSize;
    if (r * kWarpSize >= p.pairs_per_warp || pair >= p.num_pairs) break;
    int32_t row = -1;
    if (found[r] >= 0) {
      const int32_t e = found[r] & 0xffff, at = s.place[e] + counts[e] + (found[r] >> 16);
      row = at + s.shift[e];
      s.pairs[at] = pair;
      s.rows[at] = row;
    }
    p.row_map[pair] = row;
  }
  clock_mark(6);
  __syncthreads();
  for (int i = thread; i < num_own; i += kThreads) p.source[s.rows[i]] = s.pairs[i];
  clock_mark(7);

  for (int e = rank * kWarps + warp_id(); e < num_experts; e += blocks * kWarps)
    for (int64_t row = s.ends[e] + lane_id(); row < s.ends[num_experts + e]; row += kWarpSize)
      p.source[row] = -1;
  const int64_t tail = static_cast<int32_t>(all);
  for (int64_t row = tail + rank * kThreads + thread; row < p.num_rows; row += blocks * kThreads)
    p.source[row] = -1;
  cluster_wait();
  clock_mark(8);
}

}  // namespace

Status permute_plan_sm90(const PermutePlanParams& params, void* stream) {
  ClusterPlan p{params, 0, 0, 0};
  const int64_t pairs = p.num_tokens * p.top_k;
  p.num_pairs = static_cast<int32_t>(pairs);
  p.num_rows = pairs + int64_t{p.num_experts} * (p.align - 1);
  const unsigned blocks = pairs <= kPairsOfOneBlock ? 1 : kBlocks;
  const int64_t round = int64_t{blocks} * kThreads;
  p.pairs_per_warp =
      static_cast<int32_t>(std::max<int64_t>(1, (pairs + round - 1) / round)) * kWarpSize;
  LaunchConfig config{dim3(blocks), dim3(kThreads), shared_bytes(p), stream};
  config.cluster = blocks;
  config.overlaps = true;
  return launch(plan_in_cluster_kernel, config, p);
}

}  // namespace kimi::permutation
