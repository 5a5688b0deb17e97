// SPDX-License-Identifier: MIT
//
// Clusters (sm_90): blocks that run together and reach each other's shared memory.
// LaunchConfig::cluster says how many follow one another along x.
//
// All meet, by cluster_arrive(); cluster_wait();, before one reaches another's shared memory for
// the first time (it may not have started, nor initialised its barriers), and before a block ends
// whose shared memory another may still reach.
#pragma once

#include "device/mbarrier.cuh"
#include "device/platform.cuh"
#include "device/vec.cuh"

namespace kimi {

#if defined(KIMI_HOST_SIMT)

inline int cluster_rank() { return simt::cluster_rank(); }
inline int cluster_blocks() { return simt::cluster_blocks(); }
inline void cluster_arrive(std::source_location where = std::source_location::current()) {
  simt::cluster_arrive(where);
}
inline void cluster_wait(std::source_location where = std::source_location::current()) {
  simt::cluster_wait(where);
}
inline void mbarrier_arrive_in(MBarrier& b, int rank) {
  MBarrier& there = *static_cast<MBarrier*>(simt::in_peer(&b, rank));
  detail::check_fenced(there, "mbarrier_arrive_in");
  detail::arrive(there);
}
inline uint32_t load_in(const uint32_t* address, int rank) {
  return *static_cast<const uint32_t*>(simt::in_peer(address, rank));
}
inline void store16_in(void* address, uint4 value, int rank) {
  store16(simt::in_peer(address, rank), value);
}

#else

/// %cluster_ctarank: 0 .. cluster_blocks() - 1.
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

/// %cluster_nctarank
__device__ __forceinline__ int cluster_blocks() {
  uint32_t blocks;
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return static_cast<int>(blocks);
}

/// barrier.cluster.arrive.release.aligned: every thread of every block, whole warps together.
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

/// barrier.cluster.wait.acquire.aligned: until all threads of the cluster have arrived.
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

/// mbarrier.arrive.shared::cluster.b64 on the barrier at the same place in block `rank`. For what
/// wgmma has read and TMA may overwrite: this thread's own writes are not ordered for that block's
/// threads, for which .release.cluster would fence the whole GPU's memory.
__device__ __forceinline__ void mbarrier_arrive_in(MBarrier& b, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(detail::shared_u32(&b)),
      "r"(rank)
      : "memory");
}

/// ld.shared::cluster.u32 from the same place in block `rank`, once it has met this one.
__device__ __forceinline__ uint32_t load_in(const uint32_t* address, int rank) {
  uint32_t value;
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %1, %2;\n"
      "ld.shared::cluster.u32 %0, [remote];\n"
      "}"
      : "=r"(value)
      : "r"(detail::shared_u32(address)), "r"(rank)
      : "memory");
  return value;
}

/// st.shared::cluster.v4.u32 to the same place in block `rank`, which sees it when all have met.
__device__ __forceinline__ void store16_in(void* address, uint4 value, int rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.v4.u32 [remote], {%2, %3, %4, %5};\n"
      "}" ::"r"(detail::shared_u32(address)),
      "r"(rank), "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
      : "memory");
}

#endif

}  // namespace kimi
