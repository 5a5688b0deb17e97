// SPDX-License-Identifier: MIT
//
// Registers that move between the warpgroups of a block (sm_90a): producers give up what consumers
// need. All warps of a warpgroup do it together. A block starts with 65536 / threads registers a
// thread, in steps of 8 (168 of 384 threads: 40 + 232 + 232), if its kernel says
// __launch_bounds__(threads, 1); without the second number ptxas ignores these, with a remark.
#pragma once

#include "device/platform.cuh"

namespace kimi {

namespace detail {
template <int kCount>
constexpr bool kRegisterCount = kCount >= 24 && kCount <= 256 && kCount % 8 == 0;
}

#if defined(KIMI_HOST_SIMT)

template <int kCount>
void registers_increase(std::source_location where = std::source_location::current()) {
  static_assert(detail::kRegisterCount<kCount>, "24 to 256, a multiple of 8");
  simt::set_registers("registers_increase", kCount, true, where);
}
template <int kCount>
void registers_decrease(std::source_location where = std::source_location::current()) {
  static_assert(detail::kRegisterCount<kCount>, "24 to 256, a multiple of 8");
  simt::set_registers("registers_decrease", kCount, false, where);
}

#else

/// setmaxnreg.inc: the warp goes on when it has `kCount` registers a thread, no fewer than before.
template <int kCount>
__device__ inline void registers_increase() {
  static_assert(detail::kRegisterCount<kCount>, "24 to 256, a multiple of 8");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
}

/// setmaxnreg.dec: the warp keeps `kCount` registers a thread, no more than before.
template <int kCount>
__device__ inline void registers_decrease() {
  static_assert(detail::kRegisterCount<kCount>, "24 to 256, a multiple of 8");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
}

#endif

}  // namespace kimi
