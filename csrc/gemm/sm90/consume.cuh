// SPDX-License-Identifier: MIT
// The consumers of the Hopper product: wgmma over the stages of a tile, then its epilogue.
//
//   direct    wait full | 4 wgmma, 32 bytes deep each | commit | wait for the stage before |
//             release that one: one stage's products are always in flight
//   promoted  FP8: promote.cuh
//
// A consumer none of whose 64 rows exists lets its stages pass.
//
// Lead: where consumer 0 is some stages ahead at the start of a tile, each has the tensor cores for
// itself while the other one stores. Nothing else would hold them apart: each late stage costs the
// one that leads. *Predicted*: what wgmma stands still between two tiles shrinks by 512 cycles a
// stage of lead, and the ring is as many stages less ahead of memory.
#pragma once

#include "device/barrier.cuh"
#include "device/fence.cuh"
#include "device/vec.cuh"
#include "gemm/sm90/job.h"
#include "gemm/sm90/promote.cuh"

namespace kimi::gemm::sm90 {

inline constexpr int kConsumerBarrier = 1;

// Rows `valid`.. of a K-grouped stage belong to the next group: 0 in both operands, for what is
// there may be infinite. All consumers.
template <class X>
__device__ inline void clear_rows(Stage<X>& stage, int valid) {
  constexpr int kBoxes = (X::kABytes + X::kBBytes) / kBoxBytes;
  const int end = kBoxBytes - valid * kRowBytes;
  char* const first = stage.a + valid * kRowBytes;
  for (int i = 16 * (static_cast<int>(threadIdx.x) - kGroupThreads); i < end;
       i += 16 * 2 * kGroupThreads)
#pragma unroll 1
    for (int box = 0; box < kBoxes; ++box) store16(first + box * kBoxBytes + i, uint4{0, 0, 0, 0});
  fence_async_shared();
  named_barrier_sync(kConsumerBarrier, 2 * kGroupThreads);
}

// The sums of a tile's stages, of which there is at least one, and of kCols columns.
// `lead`: stages that consumer 0 commits before consumer 1 begins; none are negative. `gathered`:
// by cp.async, which wgmma sees after a fence alone.
template <class X, int kCols>
__device__ inline void sum_direct(Shared<X>& s, const Work& work, int consumer, bool gathered,
                                  int lead, MBarrier& led, Ring<X::kStages>& ring,
                                  float (&d)[kCols / 2]) {
  const int stages = stages_of<X>(work);
  if (lead >= stages) lead = stages - 1;  // rows of a last stage all consumers clear together
  int before = 0;
  wgmma_fence(d);
#pragma unroll 1
  for (int step = 0; step < stages; ++step, ring.next()) {
    if (step == lead && threadIdx.x == kGroupThreads) mbarrier_arrive(led);
    mbarrier_wait(s.full[ring.at], ring.parity);
    if (gathered) fence_async_shared();
    Stage<X>& stage = s.stages[ring.at];
    if constexpr (X::kGrouping == Grouping::kK) {
      const int valid = work.depth - step * X::kBlockDepth;
      if (valid < X::kBlockDepth) clear_rows<X>(stage, valid);
    }
    wgmma_fence();
    const uint64_t a = wgmma_descriptor<X::kAMajor>(stage.a + consumer * kBoxBytes);
    const uint64_t b = wgmma_descriptor<X::kBMajor>(stage.b);
#pragma unroll
    for (int k = 0; k < 4; ++k)
      wgmma<typename X::T, kCols, X::kAMajor, X::kBMajor>(
          d, wgmma_advance<X::kAMajor>(a, k), wgmma_advance<X::kBMajor>(b, k), step > 0 || k > 0);
    wgmma_commit();
    wgmma_wait<1>();
    if (step > 0) release<X>(s.empty[before]);
    before = ring.at;
  }
  wgmma_wait<0>();
  wgmma_fence(d);
  release<X>(s.empty[before]);
}

template <class X>
__device__ inline void consume(const Product& p, const Trial& trial,
                               const typename X::Epilogue::Params& params, Shared<X>& s) {
  const int consumer = static_cast<int>(threadIdx.x) / kGroupThreads - 1, warp = warp_id() % 4;
  const int in_tile = consumer * kConsumerRows + warp * 16;  // the warp's first row
  char* const scratch = s.scratch[consumer * 4 + warp];
  Ring<X::kStages> ring;
  Ring<kTileSlots> slot;
  const bool gathered = p.a.index != nullptr || p.b.index != nullptr;
  const int lead = trial.lead > 0 ? std::min(trial.lead, X::kStages - 1) : -1;
  [[maybe_unused]] uint32_t turn = 0;
  [[maybe_unused]] bool asked = false;  // what the next tile is added to: by one thread
  float d[X::kSums];
  for (;; slot.next()) {
    mbarrier_wait(s.tile_full[slot.at], slot.parity);
    const Work& work = s.tiles[slot.at];  // read anew where registers are free
    if (work.group < 0) break;
    if constexpr (X::kGrouping == Grouping::kK)
      if (params.prefetches && threadIdx.x % kGroupThreads == 0) {
        if (!asked) X::Epilogue::prefetch(params, work, consumer);
        Ring<kTileSlots> next = slot;
        next.next();
        asked = mbarrier_test(s.tile_full[next.at], next.parity);
        if (asked) X::Epilogue::prefetch(params, s.tiles[next.at], consumer);
      }
    // Of K-grouped products all consumers clear rows.
    const bool mine = X::kGrouping == Grouping::kK || work.rows > consumer * kConsumerRows;
    if (X::kScaled || work.depth == 0) {
#pragma unroll
      for (int i = 0; i < X::kSums; ++i) d[i] = 0.0f;
    }
    if (!X::kScaled && lead > 0) {
      if (work.depth == 0 && threadIdx.x == kGroupThreads) mbarrier_arrive(s.lead[slot.at]);
      if (consumer == 1 && mine) mbarrier_wait(s.lead[slot.at], slot.parity);
    }
    if (mine && work.depth > 0) {
      if constexpr (X::kScaled)
        sum_promoted<X>(s, work, consumer, trial, turn, ring, d);
      else if (X::kHalves && work.half)
        sum_direct<X, X::kBRows / 2>(s, work, consumer, gathered, lead, s.lead[slot.at], ring,
                                     reinterpret_cast<float (&)[X::kSums / 2]>(d));
      else
        sum_direct<X, X::kBRows>(s, work, consumer, gathered, lead, s.lead[slot.at], ring, d);
    } else {
      for (int step = stages_of<X>(work); step > 0; --step, ring.next()) {
        mbarrier_wait(s.full[ring.at], ring.parity);
        warp_barrier();
        release<X>(s.empty[ring.at]);
      }
    }
    if (trial.epilogue != 0 &&
        work.rows > (X::Epilogue::kTogether ? consumer * kConsumerRows : in_tile))
      X::Epilogue::template run<X>(params, p, work, work.row + in_tile, work.rows - in_tile, d,
                                   scratch);
    warp_barrier();
    if (lane_id() == 0) mbarrier_arrive(s.tile_empty[slot.at]);
  }
  X::Epilogue::end(params);
}

}  // namespace kimi::gemm::sm90
