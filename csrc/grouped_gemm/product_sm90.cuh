// SPDX-License-Identifier: MIT
// The Hopper product: persistent blocks of one producing and two consuming warpgroups.
//
//   P, Q in memory -- TMA or cp.async --> ring of stages -- wgmma --> sums in registers -- epilogue
//   --> C
//
// The tile that comes next is loaded while the consumers write the last one.
#pragma once

#include "device/launch.cuh"
#include "device/registers.cuh"
#include "grouped_gemm/consume_sm90.cuh"
#include "grouped_gemm/produce_sm90.cuh"

namespace kimi::grouped::sm90 {

template <class T, Plan kPlan>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ Product p, const __grid_constant__ Maps maps,
                   int blocks) {
  using X = Traits<T, kPlan>;
  KIMI_SHARED(char, memory);
  const Shared<X> shared{memory};
  const int rank = blocks == 1 ? 0 : cluster_rank();
  const bool gathers = p.p.index != nullptr || p.q.index != nullptr;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < X::kStages; ++stage) {
      mbarrier_init(shared.full(stage), gathers ? 1 + kGroupThreads : 1);
      mbarrier_init(shared.empty(stage), static_cast<uint32_t>(kConsumerWarps * blocks));
    }
    mbarrier_fence_init();
  }
  if (blocks > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
  if (threadIdx.x < kGroupThreads) {
    registers_decrease<kProducerRegisters>();
    if (gathers)
      produce_by_gather<X>(p, maps, shared, blocks, rank);
    else if (warp_id() == 0)
      produce_by_tma<X>(p, maps, shared, blocks, rank);
  } else {
    registers_increase<kConsumerRegisters>();
    consume<X>(p, shared, blocks, rank);
  }
  if (blocks > 1) {  // the other block still writes here
    cluster_arrive();
    cluster_wait();
  }
}

// Maps of what TMA loads.
template <class X>
Status encode_maps(const Product& p, Maps* maps) {
  using T = typename X::T;
  constexpr int64_t kSize = sizeof(T);
  if (p.p.index == nullptr) {
    const int64_t inner = X::kDepthwise ? p.rows : p.depth;
    const int64_t stride = X::kDepthwise ? p.p.depth_stride : p.p.outer_stride;
    const int64_t sizes[] = {inner, p.num_rows}, strides[] = {stride * kSize};
    const int32_t box[] = {64, X::kDepthwise ? 64 : X::kPBoxRows};
    KIMI_RETURN_IF_ERROR(
        encode_tensor_map<T>(&maps->p, p.p.data, 2, sizes, strides, box, Swizzle::k128));
  }
  if (p.q.index != nullptr) return Status::ok();
  constexpr bool kOuter = X::kQMajor == Major::kOuter;
  const int64_t outer = p.cols * (X::kPairs ? 2 : 1), depth = X::kDepthwise ? p.num_rows : p.depth;
  const int64_t stride = kOuter ? p.q.depth_stride : p.q.outer_stride;
  const int64_t sizes[] = {kOuter ? outer : depth, kOuter ? depth : outer, p.num_groups};
  // That of a single group means nothing.
  const int64_t strides[] = {stride * kSize, p.num_groups > 1 ? p.q.group_stride * kSize : 16};
  const int32_t box[] = {64, kOuter ? 64 : X::kQBoxRows, 1};
  return encode_tensor_map<T>(&maps->q, p.q.data, X::kDepthwise ? 2 : 3, sizes, strides, box,
                              Swizzle::k128);
}

template <class T, Plan kPlan>
Status run(const Job& job, void* stream) {
  using X = Traits<T, kPlan>;
  const Product& p = job.product;
  const int64_t blocks = job.paired ? 2 : 1, tile_rows = X::kTileRows * blocks;
  const int64_t rows = X::kDepthwise ? p.rows : p.num_rows;
  const int64_t full = rows / tile_rows;  // and one more that is not full in each group
  const int64_t row_tiles = X::kDepthwise ? (full + (rows % tile_rows != 0)) * p.num_groups
                                          : std::min(rows, full + p.num_groups + 1);
  const int64_t tiles = row_tiles * ((p.cols + X::kTileCols - 1) / X::kTileCols);
  if (tiles == 0) return Status::ok();
  Maps maps{};
  KIMI_RETURN_IF_ERROR(encode_maps<X>(p, &maps));
  const auto kernel = product_kernel<T, kPlan>;
  const int64_t resident =
      resident_blocks(kernel, kThreads, X::kSharedBytes, static_cast<int>(blocks));
  LaunchConfig config{dim3(static_cast<unsigned>(std::min(tiles * blocks, resident))),
                      dim3(kThreads), X::kSharedBytes, stream};
  config.cluster = static_cast<unsigned>(blocks);
  return launch(kernel, config, p, maps, static_cast<int>(blocks));
}

}  // namespace kimi::grouped::sm90
