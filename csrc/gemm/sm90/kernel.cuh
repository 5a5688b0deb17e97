// SPDX-License-Identifier: MIT
// The Hopper product: persistent blocks of one producing and two consuming warpgroups.
//
//   P, Q in memory -- TMA or cp.async --> ring of stages -- wgmma --> sums -- epilogue --> C
//
// The tile that comes next is loaded while the consumers write the last one.
//
// By count: a multiprocessor multiplies 2048 pairs a cycle and moves 128 bytes of shared memory.
// Per stage:
//
//                 stages  wgmma    shared memory read + written   from L2
//   wide          4       1024     640 + 384 cycles               48 KB, 48 B a cycle
//   wide, paired  4       1024     640 + 384                      32 KB, 32 B a cycle
//   narrow        6        512     384 + 256                      32 KB, 64 B a cycle
//   few           8        256     256 + 192                      16 KB of Q and 1 to 8 of P
//   few, gate+up  5        512     512 + 320                      32 KB and 1 to 8
//
// Large groups get pairs to stay off a limit of L2; an H100 serves wide's 132 x 48 B = 6300 B a
// cycle without them just as fast. C: 256 columns cost a warp 64 (fp32 128) conversions or stores
// and as many cycles of shared memory, about 800 cycles a tile in which wgmma stands still, 2 % at
// a depth of 2048; bias, adding in 16 bits and the rows at a group's end take Finish, about 3500.
// Few waits for Q's bytes: 128 KB in flight a multiprocessor, three times what 4.8 TB/s need at 1
// us; wgmma is busy for a third of the time.
//
// Measured on an H100: 696 to 754 TFLOP/s with 4 groups of 8192 rows, the tensor pipe 93 % busy at
// the 1.53 GHz that the power limit leaves.
#pragma once

#include "device/launch.cuh"
#include "device/registers.cuh"
#include "gemm/sm90/consume.cuh"
#include "gemm/sm90/produce.cuh"

namespace kimi::grouped::sm90 {

template <class X>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ Product p, const __grid_constant__ Maps maps,
                   int blocks) {
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
    if (p.p.index == nullptr) tma_prefetch(maps.p);
    if (p.q.index == nullptr) tma_prefetch(maps.q);
  }
  warp_barrier();
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
    consume<X>(p, maps, shared, blocks, rank);
  }
  if (blocks > 1) {  // the other block still writes here
    warp_barrier();
    cluster_arrive();
    cluster_wait();
  }
}

// TMA writes C if 16 bytes divide its addresses; bias takes the other way, and so does adding in 16
// bits, which TMA would do in another format.
template <class X>
Status encode_out(const Product& p, Maps* maps) {
  const auto encode = [&]<class Out>() {
    const int64_t row = p.out_row_stride * int64_t{sizeof(Out)};
    // That of a single group means nothing.
    const int64_t group = p.num_groups > 1 ? p.out_group_stride * int64_t{sizeof(Out)} : row;
    maps->has_out = p.bias == nullptr && reinterpret_cast<uintptr_t>(p.out) % 16 == 0 && row > 0 &&
                    row % 16 == 0 && (!X::kDepthwise || (group > 0 && group % 16 == 0)) &&
                    (!p.accumulate || (X::kDepthwise && sizeof(Out) == 4));
    if (!maps->has_out) return Status::ok();
    const int64_t sizes[] = {p.cols, X::kDepthwise ? p.rows : p.num_rows, p.num_groups};
    const int64_t strides[] = {row, group};
    const int32_t box[] = {kRowBytes / static_cast<int32_t>(sizeof(Out)), 16, 1};
    return encode_tensor_map<Out>(&maps->out, p.out, X::kDepthwise ? 3 : 2, sizes, strides, box,
                                  Swizzle::k128);
  };
  if (p.out_dtype == KIMI_FLOAT32) return encode.template operator()<float>();
  return encode.template operator()<typename X::T>();
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
  const int64_t strides[] = {stride * kSize,
                             (p.num_groups > 1 ? p.q.group_stride : stride) * kSize};
  const int32_t box[] = {64, kOuter ? 64 : X::kQBoxRows, 1};
  return encode_tensor_map<T>(&maps->q, p.q.data, X::kDepthwise ? 2 : 3, sizes, strides, box,
                              Swizzle::k128);
}

template <class X>
Status run(const Job& job, void* stream) {
  const Product& p = job.product;
  const int64_t blocks = job.paired ? 2 : 1;
  const int64_t tiles = most_tiles(p, X::kTileRows * blocks, X::kTileCols);
  if (tiles == 0) return Status::ok();
  Maps maps{};
  KIMI_RETURN_IF_ERROR(encode_maps<X>(p, &maps));
  if constexpr (X::kStoresByTma) KIMI_RETURN_IF_ERROR(encode_out<X>(p, &maps));
  const auto kernel = product_kernel<X>;
  const int64_t resident =
      resident_blocks(kernel, kThreads, X::kSharedBytes, static_cast<int>(blocks));
  LaunchConfig config{dim3(static_cast<unsigned>(std::min(tiles * blocks, resident))),
                      dim3(kThreads), X::kSharedBytes, stream};
  config.cluster = static_cast<unsigned>(blocks);
  return launch(kernel, config, p, maps, static_cast<int>(blocks));
}

}  // namespace kimi::grouped::sm90
