// SPDX-License-Identifier: MIT
//
// Operations of a whole warp. Every lane of the warp must take part: kernels keep warps together.
// The host models of the intrinsics are the host runner's builtins.
#pragma once

#include "device/platform.cuh"

namespace kimi {

inline constexpr uint32_t kFullWarp = 0xffffffffu;
inline constexpr int kWarpSize = 32;

/// 0..31 in a one-dimensional block.
__device__ inline int lane_id() { return static_cast<int>(threadIdx.x % 32); }
__device__ inline int warp_id() { return static_cast<int>(threadIdx.x / 32); }

/// shfl.sync.idx.b32: the value of lane `source`.
template <class T>
__device__ inline T warp_broadcast(T value, int source) {
  return __shfl_sync(kFullWarp, value, source);
}

/// shfl.sync.bfly.b32: the value of lane `lane ^ lane_mask`.
template <class T>
__device__ inline T warp_exchange(T value, int lane_mask) {
  return __shfl_xor_sync(kFullWarp, value, lane_mask);
}

/// vote.sync.ballot.b32: bit l is lane l's predicate.
__device__ inline uint32_t warp_ballot(bool predicate) {
  return __ballot_sync(kFullWarp, predicate);
}

/// match.any.sync.b32: the lanes that hold the same value.
template <class T>
__device__ inline uint32_t warp_match(T value) {
  return __match_any_sync(kFullWarp, value);
}

/// redux.sync.{max,min}.{u32,s32}: one instruction from sm_80 on.
__device__ inline uint32_t warp_max(uint32_t value) { return __reduce_max_sync(kFullWarp, value); }
__device__ inline int32_t warp_max(int32_t value) { return __reduce_max_sync(kFullWarp, value); }
__device__ inline uint32_t warp_min(uint32_t value) { return __reduce_min_sync(kFullWarp, value); }
__device__ inline int32_t warp_min(int32_t value) { return __reduce_min_sync(kFullWarp, value); }

/// bar.warp.sync: orders the memory accesses of the warp's lanes.
__device__ inline void warp_barrier() { __syncwarp(kFullWarp); }

}  // namespace kimi
