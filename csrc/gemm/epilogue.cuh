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
#pragma once

#include <cstring>

#include "common/dtype.h"
#include "device/convert.cuh"
#include "device/vec.cuh"
#include "device/warp.cuh"
#include "fused_experts/activation.h"
#include "gemm/product.h"
#include "topk_gate/score.cuh"

namespace kimi::grouped {

// Where 16 rows of C lie.
struct Rows {
  int32_t group;
  int64_t row;  // the first: kRows of out, kDepth of the group's matrix
  int valid;    // of the 16; the others are not touched (0 or less: none)
};

// 8 values of a row; beyond `count` they are 0 and are not touched. `wide`: 16 bytes divide the
// address.
template <class T>
__device__ inline void load8(const T* from, float (&v)[8], int count, bool wide) {
  constexpr int kPerLoad = 16 / sizeof(T);
  if (wide && count == 8) {
#pragma unroll
    for (int i = 0; i < 8; i += kPerLoad) {
      const uint4 bits = load16(from + i);
      T values[kPerLoad];
      memcpy(values, &bits, sizeof bits);
#pragma unroll
      for (int k = 0; k < kPerLoad; ++k) v[i + k] = to_float(values[k]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = i < count ? to_float(from[i]) : 0.0f;
}

template <class T>
__device__ inline void store8(T* to, const float (&v)[8], int count, bool wide) {
  if (wide && count == 8) {
    if constexpr (sizeof(T) == 2) {
      store16(to, {round_pair<T>(v[0], v[1]), round_pair<T>(v[2], v[3]), round_pair<T>(v[4], v[5]),
                   round_pair<T>(v[6], v[7])});
    } else {
      store16(to, {bits_of(v[0]), bits_of(v[1]), bits_of(v[2]), bits_of(v[3])});
      store16(to + 4, {bits_of(v[4]), bits_of(v[5]), bits_of(v[6]), bits_of(v[7])});
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i < count) to[i] = from_float<T>(v[i]);
}

// Without the slow path of a division, which is a call: within 2 ulp while the divisor is normal
// and below 2^100; beyond that every quotient here is 0 as far as its sum is concerned.
struct ActivationOps : gate::CudaOps {
  static KIMI_HOST_DEVICE float div(float a, float b) {
    const float d = b > 0x1p100f ? 0x1p100f : b;
    float r = reciprocal_estimate(d);
    r = fma_rn(r, fma_rn(-d, r, 1.0f), r);
    return mul_rn(a, r);
  }
};

template <class T, Epilogue kEpilogue, int kChunk>
class Finish {
 public:
  static constexpr bool kPairs = kEpilogue == Epilogue::kActivate;
  static constexpr int kStride = kChunk + 8;
  static constexpr int kScratchFloats = 16 * kStride * (kPairs ? 2 : 1);  // of one warp
  static_assert(kChunk % 16 == 0 &&
                (kEpilogue != Epilogue::kActivateBackward || kChunk % kPartialColumns == 0));

  // kChunk columns of 16 rows from c[kAt ...]; kActivate: g there and u at kUpAt. All lanes come,
  // and then to write().
  template <int kAt, int kUpAt, int kN>
  __device__ static void collect(const float (&c)[kN], float* scratch) {
    put<kAt>(c, scratch);
    if constexpr (kPairs) put<kUpAt>(c, scratch + 16 * kStride);
  }
  // Columns [col, col + kChunk).
  __device__ static void write(const Product& p, const Rows& rows, int64_t col,
                               const float* scratch) {
    warp_barrier();
    constexpr int kPieces = 16 * kChunk / 8, kInRow = kChunk / 8;
#pragma unroll 1
    for (int piece = lane_id(); piece < kPieces; piece += kWarpSize) {
      const int r = piece / kInRow, at = piece % kInRow * 8;
      const float* from = scratch + r * kStride + at;
      const int64_t first = col + at, left = p.cols - first;
      const int count = r >= rows.valid || left <= 0 ? 0 : left < 8 ? static_cast<int>(left) : 8;
      float v[8];
      load8(from, v, 8, true);
      if constexpr (kEpilogue == Epilogue::kStore)
        store(p, rows.group, rows.row + r, first, v, count);
      else if constexpr (kEpilogue == Epilogue::kActivate)
        activate(p, rows.row + r, first, v, from + 16 * kStride, count);
      else
        activate_backward(p, rows.row + r, first, v, count);
    }
    warp_barrier();
  }

  // kStore of zeros: `width` columns, a multiple of 8.
  __device__ static void clear(const Product& p, const Rows& rows, int64_t col, int width) {
#pragma unroll 1
    for (int piece = lane_id(); piece < 2 * width; piece += kWarpSize) {
      const int r = piece / (width / 8);
      const int64_t first = col + piece % (width / 8) * 8, left = p.cols - first;
      const int count = r >= rows.valid || left <= 0 ? 0 : left < 8 ? static_cast<int>(left) : 8;
      float zeros[8] = {};
      store(p, rows.group, rows.row + r, first, zeros, count);
    }
  }

  // collect() where the registers hold C transposed, 16 columns x 16 rows.
  template <int kAt, int kUpAt, int kN>
  __device__ static void collect_transposed(const float (&c)[kN], float* scratch) {
    put_transposed<kAt>(c, scratch);
    if constexpr (kPairs) put_transposed<kUpAt>(c, scratch + 16 * kStride);
  }

 private:
  template <int kAt, int kN>
  __device__ static void put_transposed(const float (&c)[kN], float* scratch) {
    static_assert(kChunk == 16);
    const int column = lane_id() / 4, row = lane_id() % 4 * 2;
#pragma unroll
    for (int i = 0; i < 8; ++i)
      scratch[(row + 8 * (i / 4) + i % 2) * kStride + column + i / 2 % 2 * 8] = c[kAt + i];
  }

  template <int kAt, int kN>
  __device__ static void put(const float (&c)[kN], float* scratch) {
    const int row = lane_id() / 4, column = lane_id() % 4 * 2;
#pragma unroll
    for (int j = 0; j < kChunk / 8; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        Vec<float, 2> pair;
        pair[0] = c[kAt + 4 * j + 2 * half];
        pair[1] = c[kAt + 4 * j + 2 * half + 1];
        *reinterpret_cast<Vec<float, 2>*>(scratch + (row + 8 * half) * kStride + 8 * j + column) =
            pair;
      }
  }

  template <class Out>
  __device__ static void store_as(const Product& p, int32_t group, int64_t row, int64_t col,
                                  float (&v)[8], int count) {
    const int64_t of_group = p.ragged == Ragged::kDepth ? group * p.out_group_stride : 0;
    Out* to = static_cast<Out*>(p.out) + of_group + row * p.out_row_stride + col;
    if (p.bias != nullptr && group < p.num_groups) {
      float bias[8];
      load8(static_cast<const T*>(p.bias) + group * p.cols + col, bias, count, p.wide_out);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] += bias[i];
    }
    if (p.accumulate) {
      float old[8];
      load8(to, old, count, p.wide_out);
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] += old[i];
    }
    store8(to, v, count, p.wide_out);
  }
  __device__ static void store(const Product& p, int32_t group, int64_t row, int64_t col,
                               float (&v)[8], int count) {
    if (count == 0) return;
    if (p.out_dtype == kDtype<T>)
      store_as<T>(p, group, row, col, v, count);
    else
      store_as<float>(p, group, row, col, v, count);
  }

  __device__ static void activate(const Product& p, int64_t row, int64_t col, float (&g)[8],
                                  const float* up, int count) {
    if (count == 0) return;
    float u[8], h[8];
    load8(up, u, 8, true);
    if (p.gate_up != nullptr) {
      T* saved = static_cast<T*>(p.gate_up) + row * 2 * p.cols + col;
      store8(saved, g, count, p.wide_out);
      store8(saved + p.cols, u, count, p.wide_out);
    }
    if (p.hidden == nullptr) return;
    with_activation(p.activation, [&]<kimi_activation kActivation>() {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        h[i] = experts::gated<ActivationOps, kActivation, false>(g[i], u[i]).value;
    });
    store8(static_cast<T*>(p.hidden) + row * p.cols + col, h, count, p.wide_out);
  }

  // Every lane comes: four lanes beside each other hold the 32 columns of a partial sum.
  __device__ static void activate_backward(const Product& p, int64_t row, int64_t col,
                                           float (&c)[8], int count) {
    float g[8], u[8], h[8], dot = 0.0f, weight = 0.0f;
    if (count > 0) {
      const T* saved = static_cast<const T*>(p.gate_up) + row * 2 * p.cols + col;
      load8(saved, g, count, p.wide_out);
      load8(saved + p.cols, u, count, p.wide_out);
      weight = p.weights[p.source[row]];
      with_activation(p.activation, [&]<kimi_activation kActivation>() {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const auto a = experts::gated<ActivationOps, kActivation, true>(g[i], u[i]);
          if (i < count) dot = fma_rn(c[i], a.value, dot);
          h[i] = mul_rn(weight, a.value);
          const float dh = mul_rn(weight, c[i]);
          g[i] = mul_rn(dh, a.slope_gate);
          u[i] = mul_rn(dh, a.slope_up);
        }
      });
      T* grad = static_cast<T*>(p.grad_gate_up) + row * 2 * p.cols + col;
      store8(grad, g, count, p.wide_out);
      store8(grad + p.cols, u, count, p.wide_out);
      store8(static_cast<T*>(p.hidden) + row * p.cols + col, h, count, p.wide_out);
    }
    dot += warp_exchange(dot, 1);
    dot += warp_exchange(dot, 2);
    if (count > 0 && lane_id() % 4 == 0) {
      const int64_t stride = (p.cols + kPartialColumns - 1) / kPartialColumns;
      p.partial[row * stride + col / kPartialColumns] = dot;
    }
  }

  template <class Visitor>
  __device__ static void with_activation(kimi_activation activation, const Visitor& visit) {
    switch (activation) {
      case KIMI_ACTIVATION_GELU:
        return visit.template operator()<KIMI_ACTIVATION_GELU>();
      case KIMI_ACTIVATION_SITU:
        return visit.template operator()<KIMI_ACTIVATION_SITU>();
      default:
        return visit.template operator()<KIMI_ACTIVATION_SILU>();
    }
  }
};

}  // namespace kimi::grouped
