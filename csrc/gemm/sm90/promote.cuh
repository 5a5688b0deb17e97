// SPDX-License-Identifier: MIT
// Sums of FP8 products: partial sums of 128 of depth, kept by the tensor cores, are promoted into
// sums in fp32 by their scales.
//
//   total += a_scale b_scale partial
//
//   consumer 0   | wgmma kb | promote | wgmma kb+1 | promote |        the tensor cores have one
//   consumer 1        | wgmma kb | promote | wgmma kb+1 | ...         while the other promotes
//
// They take turns at every block of depth, for nothing else keeps them apart: a late stage costs
// the one that is ahead, until both promote at the same time and the tensor cores stand still.
// Measured on an H100 without turns: 970 cycles a block, where wgmma takes 768 and the rest of a
// consumer's about 300. The turn passes when three of a consumer's four wgmma are done
// (Trial::order 2), which serves whether the tensor cores take two queues in order or by turns; 1:
// when all are issued; 0: there are no turns. *Predicted*: 770 to 800 cycles.
//
// Gate and up, 256 rows of B: a turn of 64 x 128 for each, 256 cycles of wgmma and 64 fma, so that a
// block of depth takes 1024 cycles as long as a consumer's serial part, about 200 a turn, stays
// below 256: *predicted* 1030 to 1060. Shared memory is asked for 1125, for A is read twice.
//
// Two partials a thread would overlap as well, but their registers are better spent on 192 columns
// instead of 128: the L2 is asked for a byte every 256 C / (64 + C) operations, 192 of them instead
// of 171, and wgmma for 2 + C / 32 KiB of shared memory in C / 2 cycles, 85 bytes a cycle of 128
// instead of 96.
#pragma once

#include "device/clock.cuh"
#include "device/cluster.cuh"
#include "device/math.cuh"
#include "device/warp.cuh"
#include "device/wgmma.cuh"
#include "gemm/sm90/job.h"
#include "gemm/sm90/ring.cuh"

namespace kimi::gemm::sm90 {

// total += factor * partial, where the factor of a thread's two rows belongs to kSums / kFactors
// sums beside each other.
template <int kSums, int kFactors>
__device__ inline void promote(float (&total)[kSums], const float (&partial)[kSums],
                               const float (&factor)[kFactors][2]) {
#pragma unroll
  for (int i = 0; i < kSums; ++i)
    total[i] = fma_rn(factor[i * kFactors / kSums][i / 2 % 2], partial[i], total[i]);
}

// The stage may be loaded anew, here and in the cluster's other block. The whole warp has done with
// it before.
template <class X>
__device__ __forceinline__ void release(MBarrier& empty) {
  if (lane_id() >= X::kCluster) return;
  if constexpr (X::kCluster == 1)
    mbarrier_arrive(empty);
  else
    mbarrier_arrive_in(empty, lane_id());
}

// Adds the products of a tile's stages to the consumer's 64 rows. `turn`: the parity of the turns
// so far; there are none where consumer 1 has no rows.
template <class X>
__device__ inline void sum_promoted(Shared<X>& s, const Work& work, int consumer,
                                    const Trial& trial, uint32_t& turn, Ring<X::kStages>& ring,
                                    float (&total)[X::kSums]) {
  constexpr Major kMajor = Major::kDepth;
  const int row = (work.row & 3) + warp_id() % 4 * 16 + lane_id() / 4;  // of the loaded scales
  const int order = work.rows > kConsumerRows ? trial.order : 0;
  const auto pass = [&] {
    if (lane_id() == 0) mbarrier_arrive(s.turn[1 - consumer]);
  };
  constexpr int kSums = X::kSums / X::kParts, kFactors = X::kColumnScales / X::kParts;
  float partial[kSums];
  const int stages = stages_of<X>(work);
#pragma unroll 1
  for (int step = 0; step < stages; ++step, ring.next()) {
    clock_mark(step / 8, step % 8 == 0);
    mbarrier_wait(s.full[ring.at], ring.parity);
    const Stage<X>& stage = s.stages[ring.at];
    const uint64_t a = wgmma_descriptor<kMajor>(stage.a + consumer * kBoxBytes);
#pragma unroll
    for (int part = 0; part < X::kParts; ++part) {
      if (order > 0) {  // the first one is consumer 0's
        mbarrier_wait(s.turn[consumer], consumer == 0 ? turn ^ 1 : turn);
        turn ^= 1;
      }
      const uint64_t b = wgmma_descriptor<kMajor>(stage.b + part * X::kPartRows * kRowBytes);
      wgmma_fence(partial);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        wgmma<typename X::T, X::kPartRows, kMajor, kMajor>(partial, wgmma_advance<kMajor>(a, k),
                                                           wgmma_advance<kMajor>(b, k), k > 0);
        if (k >= 2) wgmma_commit();
      }
      if (order == 1) {
        warp_barrier();  // all lanes have had their turn
        pass();
      }
      const Scales<true>& scales = s.scales[ring.at];
      float factor[kFactors][2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float of_row = scales.of_rows[consumer][row + 8 * half];
#pragma unroll
        for (int c = 0; c < kFactors; ++c)
          factor[c][half] = mul_rn(of_row, scales.of_columns[part * kFactors + c]);
      }
      wgmma_wait<1>();
      if (order > 1) pass();
      wgmma_wait<0>();
      wgmma_fence(partial);
      if (part == X::kParts - 1) {
        warp_barrier();  // all lanes have their scales
        release<X>(s.empty[ring.at]);
      }
      if (trial.promote != 0)
        promote(reinterpret_cast<float (&)[kSums]>(total[part * kSums]), partial, factor);
      else
        total[part * kSums] = fma_rn(factor[0][0], partial[0], total[part * kSums]);
    }
  }
}

}  // namespace kimi::gemm::sm90
