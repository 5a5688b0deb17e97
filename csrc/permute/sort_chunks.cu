// SPDX-License-Identifier: MIT
// sort_chunks on CUDA (any sm_80+): one warp a row; it looks up its chunk in prefix sums that every
// block makes for itself, so that there is neither a workspace nor a second launch.
//
//   sorted     | chunk order[0] | chunk order[1] | ...     row r: the last start <= r, by bisection
//   natural    | chunk 0 | chunk 1 | ...                   its start there: read off
//   starts are kept for each segment of `segment` chunks, at most 2048 of them, 32 KB for both
//   orders; up to 2048 chunks segment = 1, at 65536 it is 32 and the warp adds up the rest
//
// Forward copies from the natural row to the sorted one, the inverse from the sorted to the
// natural. Sizes that are not a plan (negative, beyond R rows) must not come; they do not lead out
// of bounds.
//
// Cost: R rows read and written; each block reads 8 C bytes from L2. Predicted for an H200, not
// measured (4.2 TB/s): 32768 rows of 14 KB in 384 chunks, 940 MB, 224 us by bytes, 250 us expected.
#include <cstdint>

#include "permute/permute.cuh"
#include "permute/permute.h"

namespace kimi {
namespace {

using namespace permutation;

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;
constexpr int kMaxSegments = 2048;
constexpr int kAhead = 4;  // units of a lane in flight

struct SortArguments : SortChunksParams {
  int32_t segment, num_segments;  // chunks of a segment, 1..32; ceil(C / segment)
};
static_assert(KIMI_SORT_CHUNKS_MAX <= kMaxSegments * kWarpSize);

struct Chunks {
  const SortArguments& p;
  /// Chunk id at position i of the new order; -1 where there is none.
  __device__ int32_t sorted(int32_t i) const {
    if (i >= p.num_chunks) return -1;
    const int32_t id = p.order[i];
    return id >= 0 && id < p.num_chunks ? id : -1;
  }
  __device__ int64_t rows(int32_t id) const {
    return id >= 0 && id < p.num_chunks ? std::max(p.split_sizes[id], 0) : 0;
  }
};

// starts[s]: rows before segment s, whose chunks `chunk_at` names by position; the sum of all rows.
template <class ChunkAt>
__device__ int64_t scan_segments(const SortArguments& p, int64_t (&warp_sums)[kWarps],
                                 int64_t* starts, ChunkAt chunk_at) {
  int64_t total = 0;
  for (int32_t base = 0; base < p.num_segments; base += kThreads) {
    const int32_t s = base + static_cast<int32_t>(threadIdx.x);
    int64_t rows = 0;
    for (int32_t j = 0; j < p.segment && s < p.num_segments; ++j)
      rows += Chunks{p}.rows(chunk_at(s * p.segment + j));
    const int64_t start = block_exclusive_sum<kWarps>(rows, warp_sums, total);
    if (s < p.num_segments) starts[s] = start;
  }
  return total;
}

// The natural row of sorted row r, r < the sum of all rows. Every lane gets it.
__device__ int64_t natural_row(const SortArguments& p, int64_t r, const int64_t* sorted_starts,
                               const int64_t* natural_starts) {
  int32_t low = 0, high = p.num_segments;  // starts[low] <= r < starts[high]
  while (high - low > 1) {
    const int32_t middle = (low + high) / 2;
    (sorted_starts[middle] <= r ? low : high) = middle;
  }
  const Chunks chunks{p};
  if (p.segment == 1) return natural_starts[chunks.sorted(low)] + (r - sorted_starts[low]);

  const int32_t mine = lane_id() < p.segment ? chunks.sorted(low * p.segment + lane_id()) : -1;
  const int64_t rows = chunks.rows(mine);
  const int64_t end = sorted_starts[low] + warp_inclusive_sum(rows);
  const int found = __ffs(static_cast<int>(warp_ballot(end > r))) - 1;  // the first: not empty
  const int32_t id = warp_broadcast(mine, found);
  const int64_t offset = r - warp_broadcast(end - rows, found);
  const int32_t first = id - id % p.segment;
  const int64_t before = first + lane_id() < id ? chunks.rows(first + lane_id()) : 0;
  const int64_t sum = warp_broadcast(warp_inclusive_sum(before), kWarpSize - 1);
  return natural_starts[first / p.segment] + sum + offset;
}

// One row by one warp; zeros where `from` is null.
template <class Unit>
__device__ inline void copy_row(const Unit* from, Unit* to, int64_t units) {
  for (int64_t base = lane_id(); base < units; base += kAhead * kWarpSize) {
    Unit values[kAhead];
#pragma unroll
    for (int a = 0; a < kAhead; ++a) {
      const int64_t c = base + a * kWarpSize;
      values[a] = from != nullptr && c < units ? load_once(from + c) : Unit{};
    }
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
      if (const int64_t c = base + a * kWarpSize; c < units) store_once(to + c, values[a]);
  }
}

// Dynamic shared memory: starts of segments, in the new order and in the natural one.
template <class Unit>
__global__ void __launch_bounds__(kThreads)
    sort_chunks_kernel(const __grid_constant__ SortArguments p) {
  KIMI_SHARED(int64_t, sorted_starts);
  KIMI_STATIC_SHARED(int64_t, warp_sums, kWarps);
  int64_t* natural_starts = sorted_starts + p.num_segments;
  const int64_t total = std::min(
      p.num_rows,
      scan_segments(p, warp_sums, sorted_starts, [&](int32_t i) { return Chunks{p}.sorted(i); }));
  scan_segments(p, warp_sums, natural_starts, [](int32_t i) { return i; });
  __syncthreads();

  const int64_t units = p.row_bytes / static_cast<int64_t>(sizeof(Unit));
  Unit* y = static_cast<Unit*>(p.y);
  for (int64_t row = int64_t{blockIdx.x} * kWarps + warp_id(); row < p.num_rows;
       row += int64_t{gridDim.x} * kWarps) {
    int64_t from = -1, to = row;
    if (row < total) {
      const int64_t natural = natural_row(p, row, sorted_starts, natural_starts);
      from = p.inverse ? row : natural;
      to = p.inverse ? natural : row;
      if (natural >= p.num_rows) continue;
    }
    const char* source = static_cast<const char*>(p.x) + from * p.x_stride_bytes;
    copy_row(from >= 0 ? reinterpret_cast<const Unit*>(source) : nullptr, y + to * units, units);
  }
}

}  // namespace

Status sort_chunks_cuda(const SortChunksParams& p, void* stream) {
  if (p.num_rows == 0 || p.row_bytes == 0) return Status::ok();
  SortArguments a{p, 1, 0};
  while (int64_t{a.segment} * kMaxSegments < p.num_chunks) a.segment *= 2;
  a.num_segments = (p.num_chunks + a.segment - 1) / a.segment;
  const size_t smem_bytes = 2 * sizeof(int64_t) * static_cast<size_t>(a.num_segments);
  return with_widest_unit({address_bits(p.x), address_bits(p.y), static_cast<uint64_t>(p.row_bytes),
                           static_cast<uint64_t>(p.x_stride_bytes)},
                          [&]<class Unit>() {
                            const auto kernel = sort_chunks_kernel<Unit>;
                            const int64_t wanted = (p.num_rows + kWarps - 1) / kWarps;
                            const int64_t resident = resident_blocks(kernel, kThreads, smem_bytes);
                            const dim3 grid(static_cast<unsigned>(std::min(wanted, resident)));
                            return launch(
                                kernel, LaunchConfig{grid, dim3(kThreads), smem_bytes, stream}, a);
                          });
}

}  // namespace kimi
