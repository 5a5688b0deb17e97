// SPDX-License-Identifier: MIT
// What the permutation's kernels share: rows of memory units as wide as the addresses allow, the
// zeroing of padding rows, a block's prefix sum, and the shape of a grid of jobs by columns.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "device/launch.cuh"
#include "device/vec.cuh"
#include "device/warp.cuh"

namespace kimi::permutation {

inline constexpr int kMaxThreads = 256;  // of a block whose threads are columns
inline constexpr int kPaddingRows = 16;  // looked at by one job, as many bytes as two tokens of K2
inline constexpr int kBlocksAResident = 8;  // a few rounds of short blocks: the hardware balances

// ---- units: uint4, uint32_t, uint8_t -----------------------------------------------------------

/// A unit that is read once and not written by this kernel.
template <class Unit>
__device__ inline Unit load_once(const Unit* from) {
  if constexpr (sizeof(Unit) == 16)
    return load16_streaming(from);
  else
    return *from;
}
/// A unit that is not read again soon.
template <class Unit>
__device__ inline void store_once(Unit* to, Unit value) {
  if constexpr (sizeof(Unit) == 16)
    store16_streaming(to, value);
  else
    *to = value;
}

inline uint64_t address_bits(const void* p) { return reinterpret_cast<uintptr_t>(p); }

/// visit.template operator()<Unit>() for the widest unit that divides every address and distance.
template <class Visitor>
auto with_widest_unit(std::initializer_list<uint64_t> addresses, Visitor&& visit) {
  uint64_t bits = 0;
  for (uint64_t address : addresses) bits |= address;
  if (bits % sizeof(uint4) == 0) return visit.template operator()<uint4>();
  if (bits % sizeof(uint32_t) == 0) return visit.template operator()<uint32_t>();
  return visit.template operator()<uint8_t>();
}

// ---- padding -----------------------------------------------------------------------------------

inline __host__ __device__ int64_t padding_jobs(int64_t num_rows) {
  return (num_rows + kPaddingRows - 1) / kPaddingRows;
}

/// Zeroes those of rows [job * kPaddingRows, + kPaddingRows) whose source is -1, in the block's
/// columns. Every warp of the block finds them for itself: no barrier.
template <class Unit>
__device__ inline void clear_padding(const int32_t* source, int64_t num_rows, int64_t job, Unit* y,
                                     int64_t units) {
  const int64_t first = job * kPaddingRows, row = first + lane_id();
  const bool mine = lane_id() < kPaddingRows && row < num_rows;
  uint32_t padding = warp_ballot(mine && source[row] < 0);
  for (; padding != 0; padding &= padding - 1) {
    Unit* to = y + (first + __ffs(static_cast<int>(padding)) - 1) * units;
    const int64_t step = int64_t{gridDim.y} * blockDim.x;
    for (int64_t c = int64_t{blockIdx.y} * blockDim.x + threadIdx.x; c < units; c += step)
      store_once(to + c, Unit{});
  }
}

// ---- prefix sums -------------------------------------------------------------------------------

/// Sum of `value` over the lanes up to this one.
template <class T>
__device__ inline T warp_inclusive_sum(T value) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const T below = __shfl_up_sync(kFullWarp, value, static_cast<unsigned>(distance));
    if (lane_id() >= distance) value += below;
  }
  return value;
}

/// Sum of `value` over the block's earlier threads, plus `carry`, to which the sum over all threads
/// is then added. `warp_sums` [kWarps] is shared memory.
template <int kWarps, class T>
__device__ inline T block_exclusive_sum(T value, T (&warp_sums)[kWarps], T& carry) {
  const T inclusive = warp_inclusive_sum(value);
  __syncthreads();  // the previous call's readers are done
  if (lane_id() == kWarpSize - 1) warp_sums[warp_id()] = inclusive;
  __syncthreads();
  T before = carry;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp_id()) before += warp_sums[w];
    carry += warp_sums[w];
  }
  return before + inclusive - value;
}

// ---- launch ------------------------------------------------------------------------------------

/// One thread a column in whole warps, one block a job; where the jobs are few, several blocks
/// share a job's columns. Jobs and columns beyond the grid are reached by going round.
template <class Params>
Status launch_by_columns(void (*kernel)(Params), const Params& p, int64_t jobs, int64_t columns,
                         void* stream, bool overlaps = false) {
  const int64_t parts = std::max<int64_t>(1, (columns + kMaxThreads - 1) / kMaxThreads);
  const int64_t even = (columns + parts - 1) / parts;  // columns of a part
  const int threads = static_cast<int>(std::max<int64_t>(1, (even + 31) / 32) * 32);
  const int64_t resident = resident_blocks(kernel, threads, 0);
  const int64_t split = std::clamp<int64_t>(resident / jobs, 1, std::min<int64_t>(parts, 65535));
  const dim3 grid(static_cast<unsigned>(std::min(jobs, resident * kBlocksAResident)),
                  static_cast<unsigned>(split));
  LaunchConfig config{grid, dim3(static_cast<unsigned>(threads)), 0, stream};
  config.overlaps = overlaps;
  return launch(kernel, config, p);
}

}  // namespace kimi::permutation
