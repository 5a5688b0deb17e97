// SPDX-License-Identifier: MIT
//
// Registers that move between the warpgroups of a block (sm_90a): producers give up what consumers
// need. All warps of a warpgroup do it together, once. ptxas ignores it, with a remark, unless it
// knows the count at the start: __launch_bounds__(threads, blocks) with both numbers.
#pragma once

#include "device/platform.cuh"

namespace kimi {

namespace detail {
template <int kCount>
constexpr bool kRegisterCount = kCount >= 24 && kCount <= 256 && kCount % 8 == 0;
}

/// setmaxnreg.inc: the warp goes on when `kCount` registers a thread are there.
template <int kCount>
__device__ inline void registers_increase() {
  static_assert(detail::kRegisterCount<kCount>, "24 to 256, a multiple of 8");
#if !defined(KIMI_HOST_SIMT)
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

/// setmaxnreg.dec: the warp keeps `kCount` registers a thread.
template <int kCount>
__device__ inline void registers_decrease() {
  static_assert(detail::kRegisterCount<kCount>, "24 to 256, a multiple of 8");
#if !defined(KIMI_HOST_SIMT)
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
#endif
}

}  // namespace kimi
