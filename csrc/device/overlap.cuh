// SPDX-License-Identifier: MIT
//
// Programmatic dependent launch (sm_90): a kernel with LaunchConfig::overlaps is set up, and does
// what hangs on nothing, while the kernel before it on the stream ends.
//
//   kernel n      ...|wait|let_next_start  . . . . . . . . . . end|
//   kernel n + 1                          |launch, set-up, wait . .|goes on
//
// Three rules keep it correct, whatever came before:
//   1. Every thread calls wait_for_previous() before it first reads *or writes* global memory that
//      any kernel may write, or that the one before may read. After it all earlier kernels have
//      ended and their writes are seen.
//   2. let_next_start() comes after wait_for_previous(): so when a kernel begins, all but the one
//      before it have ended. Never are three at work.
//   3. What a launcher knows to be older than the kernel before (which it launched itself), and not
//      written by that, may be read before the wait: by TMA, or by load_older().
// A kernel that is launched without `overlaps` begins when all before it have ended; one that does
// not call let_next_start() does so by ending. So kernels of others may stand anywhere between.
//
// The host runner checks 1 for at least a thread of each block, and 2; a kernel that breaks 1 or 3
// meets what the one before has not written yet (simt::overlapped), and ThreadSanitizer reports it.
#pragma once

#include "device/platform.cuh"

namespace kimi {

#if defined(KIMI_HOST_SIMT)

inline void wait_for_previous(std::source_location where = std::source_location::current()) {
  simt::wait_for_previous(where);
}
inline void let_next_start() { simt::let_next_start(); }
inline int32_t load_older(const int32_t* address) { return *address; }

#else

/// griddepcontrol.wait: until all kernels before this one have ended. Below sm_90 they have.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// griddepcontrol.launch_dependents: the next kernel may begin once every block has come here.
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// ld.relaxed.gpu.global: from where all multiprocessors meet, past a cache that may be stale.
__device__ __forceinline__ int32_t load_older(const int32_t* address) {
  int32_t value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(address) : "memory");
  return value;
}

#endif

}  // namespace kimi
