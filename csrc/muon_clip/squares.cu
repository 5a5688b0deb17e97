// SPDX-License-Identifier: MIT
// Sums of squares on CUDA (any sm_80+), in the order of muon_clip.h, and the factor that clips.
//
//   squares   64 threads sum a block of 2^13 elements, 8 neighbours each, 16 rows of 512; a second
//             launch adds a tensor's blocks with 256 threads
//   clip      one warp, thread l has the tensors l, l + 32, ...
//
// Predicted for an H200, not measured: the 4 bytes of an fp32 element, 1.0 ms for 10^9 of them; the
// conversions to fp64 (16 a clock and SM) take 0.3 ms.
#include <cstdint>
#include <vector>

#include "muon_clip/muon_clip.cuh"

namespace kimi {
namespace {

using namespace muon_clip_cuda;

constexpr int kThreads = kPartials / kRun;

struct SquaresNumbers {
  double *sums, *squares;  // of blocks and of tensors
  kimi_dtype dtype;
};
struct SquaresEntry {
  const void* x;
  int64_t size, place, first_block;
};
using SquaresTable = Table<SquaresNumbers, SquaresEntry>;

__global__ void __launch_bounds__(kThreads)
    squares_kernel(const __grid_constant__ SquaresTable table) {
  KIMI_STATIC_SHARED(double, shared, kThreads);
  const SquaresEntry& e = table.of(blockIdx.x);
  const bool wide = aligned16(e.x);
  const int64_t begin = (blockIdx.x - e.first_block) * kBlock;
  const int64_t end = std::min(e.size, begin + kBlock);
  double sums[kRun] = {};
#pragma unroll 2
  for (int64_t i = begin + kRun * threadIdx.x; i < end; i += kPartials) {
    float x[kRun];
    load8(e.x, table.numbers.dtype, i, x, static_cast<int>(std::min<int64_t>(kRun, end - i)), wide);
#pragma unroll
    for (int k = 0; k < kRun; ++k) sums[k] += static_cast<double>(x[k]) * static_cast<double>(x[k]);
  }
  const double sum = block_tree(tree(sums, kRun), shared);
  if (threadIdx.x == 0) table.numbers.sums[blockIdx.x] = sum;
}

// A block a tensor.
__global__ void __launch_bounds__(kBlockLanes)
    add_blocks_kernel(const __grid_constant__ SquaresTable table) {
  KIMI_STATIC_SHARED(double, shared, kBlockLanes);
  const SquaresEntry& e = table.entries[blockIdx.x];
  const double* sums = table.numbers.sums + e.first_block;
  const int64_t blocks = (e.size + kBlock - 1) / kBlock;
  double mine = 0.0;
#pragma unroll 8
  for (int64_t b = threadIdx.x; b < blocks; b += kBlockLanes) mine += sums[b];
  const double sum = block_tree(mine, shared);
  if (threadIdx.x == 0) table.numbers.squares[e.place] = sum;
}

struct ClipNumbers {
  const double* squares;
  double* lanes;  // sums so far
  float* factor;
  double max_norm;
  int32_t is_first, is_last;  // of the launches of a list
};
struct ClipEntry {
  int32_t first_piece, end_piece;
  int64_t first_block;
};
using ClipTable = Table<ClipNumbers, ClipEntry>;
static_assert(ClipTable::kMost >= kTensorLanes);

__global__ void __launch_bounds__(kTensorLanes)
    clip_factor_kernel(const __grid_constant__ ClipTable table) {
  KIMI_STATIC_SHARED(double, shared, kTensorLanes);
  const ClipNumbers& n = table.numbers;
  double mine = n.is_first ? 0.0 : n.lanes[threadIdx.x];
  for (int t = static_cast<int>(threadIdx.x); t < table.count; t += kTensorLanes) {
    const ClipEntry& e = table.entries[t];
    if (moves(n.squares, e.first_piece, e.end_piece))
      for (int64_t i = e.first_piece; i < e.end_piece; ++i) mine += n.squares[i];
  }
  n.lanes[threadIdx.x] = mine;
  const double sum = block_tree(mine, shared);
  if (n.is_last && threadIdx.x == 0) *n.factor = clip_factor_of(sum, n.max_norm);
}

}  // namespace

Status squares_cuda(const SquaresParams& p, void* stream) {
  SquaresTable table{{static_cast<double*>(p.workspace), p.squares, p.dtype}, {}, 0};
  const auto fill = [&](SquaresEntry& e, int64_t t) {
    e = {p.x[t], p.sizes[t], p.places[t], 0};
    return blocks_of(e.size);
  };
  return in_tables(table, p.count, true, fill, [&](SquaresTable& full, int64_t blocks) {
    if (blocks > 0)
      KIMI_RETURN_IF_ERROR(launch(squares_kernel, grid(blocks, kThreads, stream), full));
    KIMI_RETURN_IF_ERROR(launch(add_blocks_kernel, grid(full.count, kBlockLanes, stream), full));
    full.numbers.sums += blocks;
    return Status::ok();
  });
}

Status clip_factor_cuda(const ClipFactorParams& p, void* stream) {
  ClipTable table{
      {p.squares, static_cast<double*>(p.workspace), p.factor, p.max_norm, 1, 0}, {}, 0};
  int64_t last = 0;
  const auto fill = [&](ClipEntry& e, int64_t t) {
    e = {static_cast<int32_t>(p.pieces[2 * t]), static_cast<int32_t>(p.pieces[2 * t + 1]), 0};
    last = t;
    return int64_t{1};
  };
  return in_tables(table, p.count, true, fill, [&](ClipTable& full, int64_t) {
    full.numbers.is_last = last + 1 == p.count;
    KIMI_RETURN_IF_ERROR(launch(clip_factor_kernel, grid(1, kTensorLanes, stream), full));
    full.numbers.is_first = 0;
    return Status::ok();
  });
}

}  // namespace kimi
