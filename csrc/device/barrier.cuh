// SPDX-License-Identifier: MIT
//
// Named barriers: some warps of a block meet without the others.
#pragma once

#include "device/platform.cuh"

namespace kimi {

/// bar.sync id, threads: waits until `threads` threads (a multiple of 32) have come to barrier `id`
/// (1..15; 0 is __syncthreads), and orders their memory accesses.
#if defined(KIMI_HOST_SIMT)
inline void named_barrier_sync(int id, int threads,
                               std::source_location where = std::source_location::current()) {
  simt::detail::block_barrier("named_barrier_sync", id, threads, false, where);
}
#else
__device__ inline void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
#endif

}  // namespace kimi
