// SPDX-License-Identifier: MIT
// The Hopper product: persistent blocks of one producing and two consuming warpgroups.
//
//   A, B in memory -- TMA or cp.async --> ring of stages -- wgmma --> sums -- epilogue --> C
//   offsets -- schedule --> ring of tiles ---------------------------------------^
//
// One kernel for every product: a schedule (groups along M or K, a batch, a lower triangle), a load
// (TMA, gathered, scaled), an accumulation (direct, promoted every 128 of depth) and an epilogue.
// The tile that comes next is loaded while the consumers write the last one.
//
// By count: a multiprocessor multiplies 2048 values of 16 bits a cycle (FP8 twice as many) and
// moves 128 bytes of shared memory. Per stage of 16 bits:
//
//                 stages  wgmma    shared memory read + written   from L2
//   whole         4       1024     640 + 384 cycles               48 KB, 48 B a cycle
//   half          4       512      384 + 256                      32 KB, 64 B a cycle
//
// Of a tile the first half alone is loaded and multiplied where the other one lies past C (N 1408
// is 5 tiles and a half) or above the diagonal (8 of the 72 tiles of 2048 rows), and everywhere
// where whole tiles are too few for all multiprocessors.
//
// C: 256 columns cost a warp 64 (fp32 128) conversions or stores and as many cycles of shared
// memory, about 800 cycles a tile in which wgmma stands still, 2 % at a depth of 2048. What is
// added to comes into the L2 before: additions to a line that is not there wait for memory. Where a
// group has at most 64 rows, consumer 1 is idle and the upper half of A unread. Few rows need no
// tile of their own: measured on an H100, weights as the M operand of wgmma won 1 to 2 % at 8 rows
// and lost from 48 on. Nor do many need clusters: two blocks that shared B won 4 and 5 % at two of
// 30 shapes and took up to a third longer elsewhere.
//
// Measured on an H100, before consumers took their tiles from the producers: 696 to 754 TFLOP/s
// with 4 groups of 8192 rows, the tensor pipe 93 % busy at the 1.53 GHz of the power limit.
#pragma once

#include "device/launch.cuh"
#include "device/registers.cuh"
#include "gemm/sm90/consume.cuh"
#include "gemm/sm90/finished.cuh"
#include "gemm/sm90/gather.cuh"
#include "gemm/sm90/job.h"
#include "gemm/sm90/produce.cuh"
#include "gemm/sm90/store.cuh"

namespace kimi::gemm::sm90 {

// All threads of the cluster's blocks.
template <class X>
__device__ inline void meet() {
  if constexpr (X::kCluster == 1) {
    __syncthreads();
  } else {
    warp_barrier();
    cluster_arrive();
    cluster_wait();
  }
}

template <class X>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ Product p, const __grid_constant__ InputsOf<X> in,
                   const __grid_constant__ typename X::Epilogue::Params params) {
  KIMI_SHARED(Shared<X>, memory);
  Shared<X>& s = *memory;
  const bool gathers = !X::kScaled && (p.a.index != nullptr || p.b.index != nullptr);
  if (threadIdx.x == 0) {
    for (int i = 0; i < X::kStages; ++i) {
      mbarrier_init(s.full[i], gathers ? 1 + kGroupThreads : 1);
      mbarrier_init(s.empty[i], X::kCluster * kConsumerWarps);
    }
    for (int i = 0; i < kTileSlots; ++i) {
      mbarrier_init(s.tile_full[i], 1);
      mbarrier_init(s.tile_empty[i], kConsumerWarps);
      mbarrier_init(s.lead[i], 1);
    }
    if constexpr (X::kScaled)
      for (MBarrier& turn : s.turn) mbarrier_init(turn, kConsumerWarps / kConsumers);
    mbarrier_fence_init();
    if (X::kGrouping == Grouping::kK || p.depth > 0) {
      if (p.a.index == nullptr) tma_prefetch(in.a);
      if (p.b.index == nullptr) tma_prefetch(in.b);
      if constexpr (X::kScaled) tma_prefetch(in.row_scales);
    }
  }
  meet<X>();
  if (!(reads_ahead<X>(p) && warp_id() == 0)) {
    wait_for_previous();
    let_next_start();
  }
  if (threadIdx.x < kGroupThreads) {
    registers_decrease<X::kProducerRegisters>();
    if constexpr (!X::kScaled)
      if (gathers) produce_by_gather<X>(p, in, s);
    if (!gathers && warp_id() == 0) produce_by_tma<X>(p, in, s);
  } else {
    registers_increase<X::kConsumerRegisters>();
    consume<X>(p, in.trial, params, s);
  }
  if constexpr (X::kCluster > 1) meet<X>();  // the other block still loads into this one
}

// The map of an outer-major operand that all groups share, as 64 columns x depth x columns / 64: a
// box is a stage. `whole`: whether there is one.
template <class T>
Status encode_whole(TensorMap* map, const Matrix& m, int64_t outer, int64_t depth,
                    int32_t tile_outer, bool* whole) {
  *whole = trial().boxes != 0 && m.index == nullptr && depth > 0 && outer % 64 == 0;
  if (!*whole) return Status::ok();
  const int64_t sizes[] = {64, depth, outer / 64};
  const int64_t strides[] = {m.depth_stride * int64_t{sizeof(T)}, kRowBytes};
  const int32_t box[] = {64, 64, tile_outer / 64};
  return encode_tensor_map<T>(map, m.data, 3, sizes, strides, box, Swizzle::k128);
}

// The map of an operand without an index: boxes of 128 bytes along `major`, and across it of 64 of
// depth or `box_rows` rows. `groups`: 0 where all share one matrix.
template <class T>
Status encode_operand(TensorMap* map, const Matrix& m, Major major, int64_t outer, int64_t depth,
                      int32_t groups, int32_t box_rows) {
  if (m.index != nullptr || depth == 0) return Status::ok();
  constexpr int64_t kSize = sizeof(T);
  const bool by_depth = major == Major::kDepth;
  const int64_t stride = (by_depth ? m.outer_stride : m.depth_stride) * kSize;
  const int64_t sizes[] = {by_depth ? depth : outer, by_depth ? outer : depth, groups};
  // That of a single group means nothing.
  const int64_t strides[] = {stride, groups > 1 ? m.group_stride * kSize : stride};
  const int32_t box[] = {kRowBytes / static_cast<int32_t>(kSize), by_depth ? box_rows : 64, 1};
  return encode_tensor_map<T>(map, m.data, groups > 0 ? 3 : 2, sizes, strides, box, Swizzle::k128);
}

template <class X>
Status encode_inputs(const Product& p, Inputs* in) {
  using T = typename X::T;
  const bool of_k = X::kGrouping == Grouping::kK, batch = X::kGrouping == Grouping::kBatch;
  const int64_t rows = X::kGrouping == Grouping::kM ? p.groups.num_rows : p.rows;
  const int64_t depth = of_k ? p.groups.num_rows : p.depth, cols = p.cols * (X::kGated ? 2 : 1);
  in->trial = trial();
  if constexpr (X::kGrouping == Grouping::kK) {
    KIMI_RETURN_IF_ERROR(encode_whole<T>(&in->a, p.a, rows, depth, kTileRows, &in->whole_a));
    KIMI_RETURN_IF_ERROR(encode_whole<T>(&in->b, p.b, cols, depth, X::kBRows, &in->whole_b));
  }
  if (!in->whole_a)
    KIMI_RETURN_IF_ERROR(encode_operand<T>(&in->a, p.a, X::kAMajor, rows, depth,
                                           batch ? p.groups.count : 0, kConsumerRows));
  if (in->whole_b) return Status::ok();
  return encode_operand<T>(&in->b, p.b, X::kBMajor, cols, depth, of_k ? 0 : p.groups.count,
                           X::kBBoxRows);
}

// TMA writes C, `box_rows` rows at a time, if 16 bytes divide its addresses; adding in 16 bits it
// would do in another format.
template <class X>
Status encode_out(const Product& p, int32_t box_rows, StoreTilesParams* params) {
  const StoreParams& out = params->out;
  const auto encode = [&]<class Out>() {
    constexpr bool kOfM = X::kGrouping == Grouping::kM;
    const int64_t row = out.row_stride * int64_t{sizeof(Out)};
    // That of a single group means nothing.
    const int64_t group = p.groups.count > 1 ? out.group_stride * int64_t{sizeof(Out)} : row;
    params->by_tma = out.bias == nullptr && reinterpret_cast<uintptr_t>(out.out) % 16 == 0 &&
                     row > 0 && row % 16 == 0 && (kOfM || (group > 0 && group % 16 == 0)) &&
                     (!out.accumulate || (!kOfM && sizeof(Out) == 4));
    if (!params->by_tma) return Status::ok();
    const int64_t sizes[] = {p.cols, kOfM ? p.groups.num_rows : p.rows, p.groups.count};
    const int64_t strides[] = {row, group};
    const int32_t box[] = {kRowBytes / static_cast<int32_t>(sizeof(Out)), box_rows, 1};
    return encode_tensor_map<Out>(&params->map, out.out, kOfM ? 2 : 3, sizes, strides, box,
                                  Swizzle::k128);
  };
  if constexpr (X::kScaled) {
    return dispatch(out.dtype, encode);
  } else {
    if (out.dtype == KIMI_FLOAT32) return encode.template operator()<float>();
    return encode.template operator()<typename X::T>();
  }
}

// What TMA adds to comes into the L2 before, a consumer's part of a tile at a time.
template <class X>
Status encode_old(const Product& p, StoreTilesParams* params) {
  const StoreParams& out = params->out;
  params->prefetches = params->by_tma && out.accumulate && trial().prefetch != 0;
  if (!params->prefetches) return Status::ok();
  const int64_t sizes[] = {p.cols, p.rows, p.groups.count};
  const int64_t strides[] = {out.row_stride * 4,
                             (p.groups.count > 1 ? out.group_stride : out.row_stride) * 4};
  const int32_t box[] = {X::kTileCols, kConsumerRows, 1};
  return encode_tensor_map<float>(&params->old, out.out, 3, sizes, strides, box, Swizzle::kNone);
}

template <class X>
Status launch_product(const Product& p, const InputsOf<X>& in,
                      const typename X::Epilogue::Params& params, void* stream) {
  static_assert(sizeof(Shared<X>) <= kSharedLimit);
  constexpr int64_t kBlocks = X::kCluster;
  const int64_t tiles =
      most_tiles(p, kTileRows, kBlocks * (X::kHalves ? in.tile_cols : X::kTileCols));
  if (tiles == 0) return Status::ok();
  const auto kernel = product_kernel<X>;
  const int64_t resident = resident_blocks(kernel, kThreads, sizeof(Shared<X>), X::kCluster);
  LaunchConfig config{dim3(static_cast<unsigned>(std::min(tiles * kBlocks, resident))),
                      dim3(kThreads), sizeof(Shared<X>), stream};
  config.cluster = X::kCluster;
  config.overlaps = p.overlaps;
  return launch(kernel, config, p, in, params);
}

// `narrow`: all tiles are halves.
template <class X>
Status run(const Product& p, const typename X::Epilogue::Params& params, void* stream,
           bool narrow = false) {
  Inputs in{};
  in.tile_cols = narrow ? X::kHalf : X::kTileCols;
  KIMI_RETURN_IF_ERROR(encode_inputs<X>(p, &in));
  return launch_product<X>(p, in, params, stream);
}

// The same of FP8 operands.
template <class X>
Status run_scaled(const Product& p, const BlockScales& scales,
                  const typename X::Epilogue::Params& params, void* stream) {
  ScaledInputs in{};
  KIMI_RETURN_IF_ERROR(encode_inputs<X>(p, &in));
  in.column_scales = scales.of_columns;
  if (p.depth > 0) {
    const int64_t sizes[] = {p.groups.num_rows, ceil_div(p.depth, kScaleDepth)};
    const int64_t stride = scales.row_stride * static_cast<int64_t>(sizeof(float));
    const int32_t box[] = {kScaleRows, 1};
    KIMI_RETURN_IF_ERROR(encode_tensor_map<float>(&in.row_scales, scales.of_rows, 2, sizes, &stride,
                                                  box, Swizzle::kNone));
  }
  return launch_product<X>(p, in, params, stream);
}

// The product stored as it is.
template <class X>
Status run_store(const Product& p, const StoreParams& out, void* stream, bool narrow = false) {
  StoreTilesParams params{out, {}, false, {}, false};
  KIMI_RETURN_IF_ERROR(encode_out<X>(p, 16, &params));
  if constexpr (X::kGrouping == Grouping::kK) KIMI_RETURN_IF_ERROR(encode_old<X>(p, &params));
  return run<X>(p, params, stream, narrow);
}

}  // namespace kimi::gemm::sm90
