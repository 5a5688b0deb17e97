// SPDX-License-Identifier: MIT
//
// The fence between the two ways to shared memory: loads and stores of threads (the generic proxy),
// and what wgmma and TMA read and write by themselves (the async proxy).
#pragma once

#include "device/platform.cuh"

namespace kimi {

/// fence.proxy.async.shared::cta: what this thread wrote to shared memory, or has seen written
/// there through a barrier, is seen by wgmma and TMA stores that come after it.
#if defined(KIMI_HOST_SIMT)
inline void fence_async_shared() { simt::fence_async_proxy(); }
#else
__device__ __forceinline__ void fence_async_shared() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
#endif

}  // namespace kimi
