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
  if (id < 1 || id > 15)
    simt::fail("named_barrier_sync: id: expected 1 to 15, got " + std::to_string(id));
  if (threads < 32)
    simt::fail("named_barrier_sync: threads: expected 32 or more, got " + std::to_string(threads));
  simt::detail::block_barrier("named_barrier_sync", id, threads, false, where);
}
#else
__device__ inline void named_barrier_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
#endif

}  // namespace kimi
