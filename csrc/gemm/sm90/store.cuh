// SPDX-License-Identifier: MIT
// StoreParams on Hopper: a warp's 16 rows leave in boxes of 128 bytes a row.
//
//   sums -- bias, old values --> stmatrix, rounded (fp32: 8 bytes a lane) --> 2 KiB, swizzled
//
//   TMA    store or add, without waiting for memory: one box is read while the next one is filled.
//          Adding in fp32 touches each element once, so that no order of additions is left open.
//          Out of bounds nothing is written; rows of the next group would be, so M-grouped it
//          takes warps all of whose 16 rows exist. Bias and adding in 16 bits take the other way.
//   lanes  16 bytes a lane, or element by element where 16 bytes do not divide the address
//
// FP8, whose stages leave no room for a second box, takes the lanes: *predicted* 660 cycles for
// 192 columns, 3 x 100 to fill, 3 x 120 to copy. By TMA (Trial::store 1) 1000: 3 x 100 and two
// waits of some 350 for a box to be read, with half as many accesses to shared memory.
#pragma once

#include <utility>

#include "device/convert.cuh"
#include "device/fence.cuh"
#include "device/stmatrix.cuh"
#include "device/tma.cuh"
#include "device/vec.cuh"
#include "gemm/sm90/ring.cuh"

namespace kimi::gemm::sm90 {

struct StoreTilesParams {
  StoreParams out;
  TensorMap map;  // of out, where TMA can write it
  bool by_tma;
  TensorMap old;    // of out, where it is added to: boxes for the L2
  bool prefetches;  // has them
};

template <class T>
class StoreTiles {
  static constexpr bool kOfFp8 = std::is_same_v<T, e4m3>;
  static constexpr int kBoxes = kOfFp8 ? 1 : 2, kStoreBoxBytes = 16 * kRowBytes;

 public:
  using Params = StoreTilesParams;
  static constexpr bool kGated = false, kWritesZeros = true, kTogether = false;
  static constexpr int kScratchBytes = kBoxes * kStoreBoxBytes;  // of a warp

  // The sums of `valid` of 16 rows from `row` on.
  template <class X>
  __device__ static void run(const Params& params, const Product& p, const Work& work, int32_t row,
                             int valid, float (&d)[X::kSums], char* boxes) {
    const StoreParams& out = params.out;
    if (work.depth == 0 && out.accumulate) return;
    if (out.dtype == KIMI_FLOAT32) return run_as<X, float>(params, p, work, row, valid, d, boxes);
    if constexpr (!kOfFp8)
      return run_as<X, T>(params, p, work, row, valid, d, boxes);
    else if (out.dtype == KIMI_BFLOAT16)
      return run_as<X, bf16>(params, p, work, row, valid, d, boxes);
    else
      return run_as<X, fp16>(params, p, work, row, valid, d, boxes);
  }
  __device__ static void end(const Params& params) {
    if (params.by_tma && lane_id() == 0) tma_store_wait<0>();
  }

  // What a consumer will add to in a tile comes into the L2. One thread.
  __device__ static void prefetch(const Params& params, const Work& work, int consumer) {
    if (work.group >= 0 && work.depth > 0)
      tma_prefetch_box(params.old, work.col, work.row + consumer * kConsumerRows, work.group);
  }

  // Columns of box kBox, from the registers to `box`.
  template <class Out, int kBox, int kN>
  __device__ static void fill_box(const float (&d)[kN], char* box) {
    const int lane = lane_id();
    if constexpr (sizeof(Out) == 2) {
      // Lane l names row l % 8 of matrix l / 8: rows 0-7 and 8-15 of 8 columns, then of the next 8.
      const int row = lane % 16, half = lane / 16;
#pragma unroll
      for (int j = 0; j < 8; j += 2) {
        constexpr int kAt = kBox * 32;
        const float* c = d + kAt + 4 * j;
        stmatrix_x4(box + row * 128 + (((j + half) ^ (row % 8)) << 4), round_pair<Out>(c[0], c[1]),
                    round_pair<Out>(c[2], c[3]), round_pair<Out>(c[4], c[5]),
                    round_pair<Out>(c[6], c[7]));
      }
    } else {
      // Odd rows take the columns in another order: else two rows would meet in each bank.
      const int row = lane / 4;
      const bool odd = row % 2 != 0;
#pragma unroll
      for (int j = 0; j < 4; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int even_at = kBox * 16 + 4 * j + 2 * half, odd_at = even_at ^ 8;
          const int piece = 2 * (odd ? j ^ 2 : j) + lane % 4 / 2;
          char* to = box + (row + 8 * half) * 128 + ((piece ^ row) << 4) + lane % 2 * 8;
          *reinterpret_cast<Vec<float, 2>*>(to) = {
              {odd ? d[odd_at] : d[even_at], odd ? d[odd_at + 1] : d[even_at + 1]}};
        }
    }
  }

 private:
  template <class X, class Out>
  __device__ static void run_as(const Params& params, const Product& p, const Work& work,
                                int32_t row, int valid, float (&d)[X::kSums], char* boxes) {
    constexpr int kCols = kRowBytes / static_cast<int>(sizeof(Out));
    const StoreParams& out = params.out;
    const bool by_tma = params.by_tma && (X::kGrouping != Grouping::kM || valid >= 16);
    if (params.by_tma && !by_tma) {  // the lanes write where TMA may still read
      if (lane_id() == 0) tma_store_wait_read<0>();
      warp_barrier();
    }
    const int64_t of_group = X::kGrouping == Grouping::kM ? 0 : work.group * out.group_stride;
    Out* const to = static_cast<Out*>(out.out) + of_group + row * out.row_stride + work.col;
    const auto* const bias = out.bias == nullptr || work.group >= p.groups.count
                                 ? nullptr
                                 : static_cast<const Bias<Out>*>(out.bias) + work.group * p.cols;
    const auto store_box = [&]<int kBox>() {
      constexpr int at = kBox * kCols;
      if (X::kHalves && at >= X::kHalf && work.half) return;  // an even number of boxes
      const int cols = static_cast<int>(p.cols) - work.col - at;
      char* const box = boxes + kBox % kBoxes * kStoreBoxBytes;
      if (by_tma) {
        if (lane_id() == 0) tma_store_wait_read<kBoxes - 1>();
        warp_barrier();
      } else {
        if (bias != nullptr) add_bias<kBox, Out>(bias + work.col + at, cols, d);
        if (out.accumulate) add_old<kBox, Out>(to + at, out.row_stride, valid, cols, d);
      }
      if (cols > 0) fill_box<Out, kBox>(d, box);
      if (by_tma) {
        fence_async_shared();
        warp_barrier();
        if (lane_id() != 0) return;
        if (cols > 0) move_box<X>(params, box, work.col + at, row, work.group);
        tma_store_commit();  // an empty group too: the boxes alternate
        return;
      }
      warp_barrier();
      copy_box<Out>(box, to + at, out.row_stride, valid, cols, out.wide);
      warp_barrier();
    };
    [&]<int... kBox>(std::integer_sequence<int, kBox...>) {
      (store_box.template operator()<kBox>(), ...);
    }(std::make_integer_sequence<int, X::kTileCols / kCols>());
  }

  template <class X>
  __device__ static void move_box(const Params& params, const char* box, int32_t col, int32_t row,
                                  int32_t group) {
    if constexpr (X::kGrouping == Grouping::kM)
      tma_store(params.map, box, col, row);
    else if (params.out.accumulate)
      tma_reduce_add(params.map, box, col, row, group);
    else
      tma_store(params.map, box, col, row, group);
  }

  // The type of bias: of A and B, or of the output where that has none.
  template <class Out>
  using Bias = std::conditional_t<kOfFp8, Out, T>;

  // A lane's sums of box kBox: visit(sum, h, column) of row lane/4 + 8 h.
  template <int kBox, class Out, int kN, class Visitor>
  __device__ static void for_each_sum(float (&d)[kN], const Visitor& visit) {
    constexpr int kSums = kRowBytes / static_cast<int>(sizeof(Out)) / 2;
#pragma unroll
    for (int i = 0; i < kSums; ++i)
      visit(d[kBox * kSums + i], i / 2 % 2, i / 4 * 8 + lane_id() % 4 * 2 + i % 2);
  }

  template <int kBox, class Out, int kN>
  __device__ static void add_bias(const Bias<Out>* bias, int cols, float (&d)[kN]) {
    for_each_sum<kBox, Out>(d, [&](float& sum, int, int column) {
      if (column < cols) sum += to_float(bias[column]);
    });
  }
  template <int kBox, class Out, int kN>
  __device__ static void add_old(const Out* old, int64_t stride, int valid, int cols,
                                 float (&d)[kN]) {
    for_each_sum<kBox, Out>(d, [&](float& sum, int h, int column) {
      const int r = lane_id() / 4 + 8 * h;
      if (r < valid && column < cols) sum += to_float(old[r * stride + column]);
    });
  }

  // A lane's 16 bytes of every fourth row.
  template <class Out>
  __device__ static void copy_box(const char* box, Out* to, int64_t stride, int valid, int cols,
                                  bool wide) {
    constexpr int kValues = 16 / static_cast<int>(sizeof(Out));
    const int piece = lane_id() % 8, left = cols - piece * kValues;
    if (left <= 0) return;
    to += piece * kValues;
#pragma unroll 1
    for (int row = lane_id() / 8; row < 16 && row < valid; row += 4) {
      const char* const from = box + row * 128 + ((piece ^ (row % 8)) << 4);
      if (wide && left >= kValues) {
        store16(to + row * stride, load16(from));
      } else {
#pragma unroll
        for (int i = 0; i < kValues; ++i)
          if (i < left) to[row * stride + i] = reinterpret_cast<const Out*>(from)[i];
      }
    }
  }
};

}  // namespace kimi::gemm::sm90
