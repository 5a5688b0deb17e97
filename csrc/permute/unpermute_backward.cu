// SPDX-License-Identifier: MIT
// unpermute's backward on CUDA (any sm_80+): one warp a pair, both gradients in one pass.
//
//   dx[t]   | 256 columns | 256 columns | ...   lane l: 8 columns of each, 8 l .. 8 l + 7
//   y[row]  |     same    |     same    |       partial[i] += dx * y: partial sum 8 l + i of 256
//   dy[row] |   w * dx    |   w * dx    |       and at last lanes l + 16, 8, 4, 2, 1, then columns
//                                               i + 4, 2, 1: the order of permute.h
//   further jobs: 16 rows of dy each, of which the padding ones are zeroed
//
// A block is 8 pairs, for K = 8 a token, so that dx comes from L1 seven times of eight. Addresses
// that 16 bytes do not divide go value by value, lane l then has columns l, l + 32, ..., l + 224.
//
// Cost (T 4096, K 8, H 7168, bf16): dx and y read, 59 + 470 MB, dy written, 470 MB. Predicted for
// an H200, not measured (4.2 TB/s): 238 us by bytes, 270 us expected.
#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "device/math.cuh"
#include "permute/permute.cuh"
#include "permute/permute.h"

namespace kimi {
namespace {

using namespace permutation;

constexpr int kPartials = 256, kEach = kPartials / kWarpSize;  // partial sums; of a lane
constexpr int kWarps = 8;

template <class T>
__device__ inline void unpack(uint4 bits, T (&values)[16 / sizeof(T)]) {
  memcpy(values, &bits, sizeof bits);
}

// The partial sums of a lane, and w * grad_x to grad_y. Loads of kAhead rounds are in flight.
template <class T>
__device__ inline void multiply_wide(const T* grad_x, const T* y, T* grad_y, float w,
                                     int64_t hidden, float (&partial)[kEach]) {
  constexpr int kColumns = 16 / sizeof(T), kParts = kEach / kColumns, kAhead = 4 / kParts;
  for (int64_t base = lane_id() * kEach; base < hidden; base += kAhead * kPartials) {
    uint4 left[kAhead][kParts], right[kAhead][kParts];
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int64_t h = base + a * kPartials + part * kColumns;
        if (h >= hidden) continue;
        left[a][part] = load16(grad_x + h);
        right[a][part] = load16_streaming(y + h);
      }
#pragma unroll
    for (int a = 0; a < kAhead; ++a)
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const int64_t h = base + a * kPartials + part * kColumns;
        if (h >= hidden) continue;
        T gradient[kColumns], value[kColumns], product[kColumns];
        unpack(left[a][part], gradient);
        unpack(right[a][part], value);
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
          const float g = to_float(gradient[i]);
          float& sum = partial[part * kColumns + i];
          sum = fma_rn(g, to_float(value[i]), sum);
          product[i] = from_float<T>(mul_rn(w, g));
        }
        uint4 bits;
        memcpy(&bits, product, sizeof bits);
        store16_streaming(grad_y + h, bits);
      }
  }
}

template <class T>
__device__ inline void multiply_narrow(const T* grad_x, const T* y, T* grad_y, float w,
                                       int64_t hidden, float (&partial)[kEach]) {
  for (int64_t base = lane_id(); base < hidden; base += kPartials)
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t h = base + j * kWarpSize;
      if (h >= hidden) continue;
      const float g = to_float(grad_x[h]);
      partial[j] = fma_rn(g, to_float(y[h]), partial[j]);
      grad_y[h] = from_float<T>(mul_rn(w, g));
    }
}

// Of lane 0: all partial sums in the order of permute.h. Wide: the lane's are neighbours.
template <bool kWide>
__device__ inline float add_partials(float (&partial)[kEach]) {
  constexpr int kOuter = kWide ? kEach : 1;
  const auto within_lane = [&] {
#pragma unroll
    for (int half = kEach / 2; half > 0; half /= 2)
#pragma unroll
      for (int i = 0; i < half; ++i) partial[i] = add_rn(partial[i], partial[i + half]);
  };
  if constexpr (!kWide) within_lane();
#pragma unroll
  for (int half = kWarpSize / 2; half > 0; half /= 2)
#pragma unroll
    for (int i = 0; i < kOuter; ++i)
      partial[i] = add_rn(partial[i], warp_exchange(partial[i], half));
  if constexpr (kWide) within_lane();
  return partial[0];
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    unpermute_backward_kernel(const __grid_constant__ UnpermuteBackwardParams p) {
  const int64_t pairs = p.num_tokens * p.top_k;
  const int64_t pair_jobs = (pairs + kWarps - 1) / kWarps;
  const int64_t jobs = pair_jobs + padding_jobs(p.num_rows);
  T* const grad_y = static_cast<T*>(p.grad_y);
  for (int64_t job = blockIdx.x; job < jobs; job += gridDim.x) {
    if (job >= pair_jobs) {
      if constexpr (kWide)
        clear_padding(p.source, p.num_rows, job - pair_jobs, reinterpret_cast<uint4*>(grad_y),
                      p.hidden * static_cast<int64_t>(sizeof(T)) / 16);
      else
        clear_padding(p.source, p.num_rows, job - pair_jobs, grad_y, p.hidden);
      continue;
    }
    const int64_t pair = job * kWarps + warp_id();
    if (pair >= pairs) continue;
    const int64_t row = p.row_map[pair];
    float partial[kEach] = {};
    if (row >= 0) {
      const T* grad_x = static_cast<const T*>(p.grad_x) + pair / p.top_k * p.grad_x_stride;
      const T* y = static_cast<const T*>(p.y) + row * p.y_stride;
      T* to = grad_y + row * p.hidden;
      if constexpr (kWide)
        multiply_wide(grad_x, y, to, p.weights[pair], p.hidden, partial);
      else
        multiply_narrow(grad_x, y, to, p.weights[pair], p.hidden, partial);
    }
    const float sum = add_partials<kWide>(partial);
    if (lane_id() == 0) p.grad_weights[pair] = sum;
  }
}

template <class T, bool kWide>
Status launch_backward(const UnpermuteBackwardParams& p, void* stream) {
  constexpr int kThreads = kWarps * kWarpSize;
  const auto kernel = unpermute_backward_kernel<T, kWide>;
  const int64_t pair_jobs = (p.num_tokens * p.top_k + kWarps - 1) / kWarps;
  const int64_t jobs = pair_jobs + padding_jobs(p.num_rows);
  if (jobs == 0) return Status::ok();
  const int64_t most = int64_t{resident_blocks(kernel, kThreads, 0)} * kBlocksAResident;
  const dim3 grid(static_cast<unsigned>(std::min(jobs, most)));
  return launch(kernel, LaunchConfig{grid, dim3(kThreads), 0, stream}, p);
}

}  // namespace

Status unpermute_backward_cuda(const UnpermuteBackwardParams& p, void* stream) {
  return dispatch(p.dtype, [&]<class T>() {
    const auto bytes = [](int64_t values) { return static_cast<uint64_t>(values) * sizeof(T); };
    return with_widest_unit(
        {address_bits(p.grad_x), address_bits(p.y), address_bits(p.grad_y), bytes(p.grad_x_stride),
         bytes(p.y_stride), bytes(p.hidden)},
        [&]<class Unit>() { return launch_backward<T, sizeof(Unit) == 16>(p, stream); });
  });
}

}  // namespace kimi
