// SPDX-License-Identifier: MIT
// From sums in registers to rows in memory, a warp for itself: 16 rows x kChunk columns at a time
// go through a scratch of fp32, then every lane takes 8 columns of one row, so that memory is read
// and written in 16-byte pieces and the arithmetic is written once for mma.sync and wgmma.
//
//   registers of mma.m16n8 and wgmma   c[kAt + 4 j + i]: row lane/4 + 8 (i/2),
//                                      column 8 j + 2 (lane%4) + i%2
//   scratch of the warp                [16][kChunk + 8] fp32
//   memory, by lane                    row piece / (kChunk/8), 8 columns
//
// The scratch costs 4 bytes written and 4 read a value; eight words of padding keep the writes free
// of bank conflicts.
//
// What becomes of 8 columns is a policy, which lives with the op that it belongs to:
//
//   Params                 what the kernel is told
//   kGated                 the tile of B is gate rows and up rows, whose sums come together
//   kWritesZeros           rows after the last group, and groups without depth, are written
//   kRun                   chunks are a multiple of so many columns
//   write(params, product, place, v, count)      kGated: v, up, count
//                          all lanes come; beyond `count` columns nothing may be touched
//   mirror(params, place, v, first, end)    if there is one: of a symmetric matrix, what write()
//                          left in v of 8 rows of a column is row `place.row` from `place.col` on,
//                          first..end-1 of it; two lanes take a column, whose 16 rows are 32 bytes
//                          or more, whole sectors
#pragma once

#include "common/dtype.h"
#include "device/vec.cuh"
#include "device/warp.cuh"
#include "gemm/product.h"

namespace kimi::gemm {

// Where 16 rows of C lie.
struct Rows {
  int32_t group;
  int64_t row;  // the first: M-grouped of out, else of the group's matrix
  int valid;    // of the 16; the others are not touched (0 or less: none)
};

// Where 8 columns of one row lie.
struct Place {
  int32_t group;
  int64_t row, col;
};

template <class Policy>
concept Mirrors = requires { &Policy::mirror; };

template <class Policy, int kChunk>
class Finish {
 public:
  static constexpr int kStride = kChunk + 8;
  static constexpr int kScratchFloats = 16 * kStride * (Policy::kGated ? 2 : 1);  // of one warp
  static_assert(kChunk % 16 == 0 && kChunk % Policy::kRun == 0);

  // kChunk columns of 16 rows from c[kAt ...]; kGated: gate there and up at kUpAt. All lanes come,
  // and then to write().
  template <int kAt, int kUpAt, int kN>
  __device__ static void collect(const float (&c)[kN], float* scratch) {
    put<kAt>(c, scratch);
    if constexpr (Policy::kGated) put<kUpAt>(c, scratch + 16 * kStride);
  }
  // Columns [col, col + kChunk).
  __device__ static void write(const typename Policy::Params& params, const Product& p,
                               const Rows& rows, int64_t col, float* scratch) {
    warp_barrier();
    constexpr int kPieces = 16 * kChunk / 8, kInRow = kChunk / 8;
#pragma unroll 1
    for (int piece = lane_id(); piece < kPieces; piece += kWarpSize) {
      const int r = piece / kInRow, at = piece % kInRow * 8;
      float* const from = scratch + r * kStride + at;
      const Place place{rows.group, rows.row + r, col + at};
      const int64_t left = p.cols - place.col;
      const int count = r >= rows.valid || left <= 0 ? 0 : left < 8 ? static_cast<int>(left) : 8;
      float v[8];
      load8(from, v, 8, true);
      if constexpr (Policy::kGated) {
        float up[8];
        load8(from + 16 * kStride, up, 8, true);
        Policy::write(params, p, place, v, up, count);
      } else {
        Policy::write(params, p, place, v, count);
        if constexpr (Mirrors<Policy>)
          if (p.lower) store8(from, v, 8, true);
      }
    }
    warp_barrier();
    if constexpr (Mirrors<Policy>)
      if (p.lower) mirror(params, rows, col, scratch);
  }

 private:
  // The same the other way, from what is finished.
  __device__ static void mirror(const typename Policy::Params& params, const Rows& rows,
                                int64_t col, const float* scratch) {
#pragma unroll 1
    for (int piece = lane_id(); piece < 2 * kChunk; piece += kWarpSize) {
      const int r = piece % 2 * 8, c = piece / 2;
      const Place place{rows.group, col + c, rows.row + r};
      const int64_t below = place.row + 1 - place.col;  // the first one below the diagonal
      const int first = below < 0 ? 0 : below < 8 ? static_cast<int>(below) : 8;
      float v[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = scratch[(r + i) * kStride + c];
      Policy::mirror(params, place, v, first, rows.valid - r < 8 ? rows.valid - r : 8);
    }
    warp_barrier();
  }
  template <int kAt, int kN>
  __device__ static void put(const float (&c)[kN], float* scratch) {
    const int row = lane_id() / 4, column = lane_id() % 4 * 2;
#pragma unroll
    for (int j = 0; j < kChunk / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Vec<float, 2> both;
        both[0] = c[kAt + 4 * j + 2 * half];
        both[1] = c[kAt + 4 * j + 2 * half + 1];
        *reinterpret_cast<Vec<float, 2>*>(scratch + (row + 8 * half) * kStride + 8 * j + column) =
            both;
      }
  }
};

// StoreParams as a policy; T is the type of A and B.
template <class T>
struct Store {
  using Params = StoreParams;
  static constexpr bool kGated = false, kWritesZeros = true;
  static constexpr int kRun = 8;

  __device__ static void write(const Params& s, const Product& p, const Place& at, float (&v)[8],
                               int count) {
    if (count == 0 || (s.accumulate && at.group >= p.groups.count)) return;
    if (s.dtype == kDtype<T>)
      write_as<T>(s, p, at, v, count);
    else
      write_as<float>(s, p, at, v, count);
  }

 private:
  template <class Out>
  __device__ static void write_as(const Params& s, const Product& p, const Place& at, float (&v)[8],
                                  int count) {
    const int64_t of_group = p.grouping == Grouping::kM ? 0 : at.group * s.group_stride;
    Out* to = static_cast<Out*>(s.out) + of_group + at.row * s.row_stride + at.col;
    if (s.bias != nullptr && at.group < p.groups.count) {
      float bias[8];
      load8(static_cast<const T*>(s.bias) + at.group * p.cols + at.col, bias, count, s.wide);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] += bias[i];
    }
    if (s.accumulate) {
      float old[8];
      load8(to, old, count, s.wide);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] += old[i];
    }
    store8(to, v, count, s.wide);
  }
};

}  // namespace kimi::gemm
