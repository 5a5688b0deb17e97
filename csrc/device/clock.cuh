// SPDX-License-Identifier: MIT
//
// When the warps of a kernel come to its phases: clock_mark(point). Nothing unless KIMI_CLOCKS is
// defined, which benchmarks/device_check/clocks.cu does before it includes the kernels.
#pragma once

#include "device/warp.cuh"

namespace kimi {

#if !defined(KIMI_CLOCKS)

__device__ __forceinline__ void clock_mark(int /*point*/, bool /*when*/ = true) {}

#else

struct Clocks {
  static constexpr int kBlocks = 16, kWarps = 32, kPoints = 16;
  long long at[kBlocks][kWarps][kPoints];  // the last time; 0: never
};
#if defined(KIMI_HOST_SIMT)
inline Clocks g_clocks;
inline long long clock_now() {
  static long long now = 0;
  return ++now;
}
#else
static __device__ Clocks g_clocks;
__device__ inline long long clock_now() { return clock64(); }
#endif

__device__ inline void clock_mark(int point, bool when = true) {
  if (when && lane_id() == 0 && blockIdx.x < Clocks::kBlocks && point < Clocks::kPoints)
    g_clocks.at[blockIdx.x][warp_id()][point] = clock_now();
}

#endif

}  // namespace kimi
