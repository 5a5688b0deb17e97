// SPDX-License-Identifier: MIT
// Sums in a fixed order, one kernel each, behind small_gradients.h.
//
//   weights      a thread a pair over the partial sums of its row; with a bias of the down
//                projection then a warp a pair for <b_down[e], dy[t]>
//   biases       a thread a column of an expert, down its rows: R cols elements read once, lines
//                whole. An expert with many rows is one thread's chain of loads: not tuned.
#include "common/dtype.h"
#include "common/integer.h"
#include "device/launch.cuh"
#include "device/math.cuh"
#include "device/warp.cuh"
#include "fused_experts/small_gradients.h"

namespace kimi::experts {
namespace {

constexpr int kThreads = 256;

dim3 blocks_of(int64_t threads) {
  return dim3(static_cast<unsigned>(ceil_div(threads, int64_t{kThreads})));
}

// grad_weights[pair] = sum of its row's partial sums in ascending order; a thread a pair.
__global__ void __launch_bounds__(kThreads)
    grad_weights_kernel(const float* partial, const int32_t* row_map, float* grad_weights,
                        int64_t num_pairs, int64_t num_partials) {
  const int64_t pair = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (pair >= num_pairs) return;
  const int64_t row = row_map[pair];
  float sum = 0.0f;
  if (row >= 0)
    for (int64_t i = 0; i < num_partials; ++i) sum += partial[row * num_partials + i];
  grad_weights[pair] = sum;
}

// grad_weights[pair] += <bias[e], dy[t]>, a warp a pair.
template <class T>
__global__ void __launch_bounds__(kThreads)
    bias_dots_kernel(const __grid_constant__ FusedExpertsBackwardParams p, int64_t num_pairs) {
  const int64_t pair = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarpSize;
  const int32_t row = pair < num_pairs ? p.row_map[pair] : -1;
  if (row < 0) return;
  int32_t e = 0;
  for (int32_t above = p.num_experts; e < above;) {  // the first group that ends after the row
    const int32_t middle = (e + above) / 2;
    if (p.offsets[middle] > row)
      above = middle;
    else
      e = middle + 1;
  }
  if (e >= p.num_experts) return;  // no plan of these ids
  const T* const dy = static_cast<const T*>(p.dy) + pair / p.top_k * p.dy_stride;
  const T* const bias = static_cast<const T*>(p.b_down) + e * p.hidden;
  float sum = 0.0f;
  for (int64_t i = lane_id(); i < p.hidden; i += kWarpSize)
    sum = fma_rn(to_float(dy[i]), to_float(bias[i]), sum);
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2)
    sum += warp_exchange(sum, distance);
  if (lane_id() == 0) p.grad_weights[pair] += sum;
}

// Of rows x [.., cols]: of tokens `source` says which, each times its weight.
struct RowSums {
  const void* x;
  int64_t stride, cols, num_rows;
  const int32_t *offsets, *source;
  int32_t top_k;
  const float* weights;
  void* out;  // [E, cols]: out[e] = sum of the rows of e
};
template <class T>
__global__ void __launch_bounds__(kThreads) row_sums_kernel(const __grid_constant__ RowSums p) {
  const int64_t col = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const int32_t e = static_cast<int32_t>(blockIdx.y);
  if (col >= p.cols) return;
  const int64_t begin = e > 0 ? p.offsets[e - 1] : 0;
  int64_t end = p.offsets[e];
  if (end > p.num_rows) end = p.num_rows;
  float sum = 0.0f;
  for (int64_t row = begin < 0 ? 0 : begin; row < end; ++row) {
    const int32_t pair = p.source != nullptr ? p.source[row] : 0;
    const int64_t from = p.source != nullptr ? pair / p.top_k : row;
    const float x = to_float(static_cast<const T*>(p.x)[from * p.stride + col]);
    sum = fma_rn(p.weights != nullptr ? p.weights[pair] : 1.0f, x, sum);
  }
  static_cast<T*>(p.out)[e * p.cols + col] = from_float<T>(sum);
}

Status sum_rows(const FusedExpertsBackwardParams& p, RowSums sums, void* stream) {
  if (sums.cols == 0) return Status::ok();
  sums.num_rows = p.num_tokens * p.top_k;
  sums.offsets = p.offsets;
  sums.top_k = p.top_k;
  dim3 grid = blocks_of(sums.cols);
  grid.y = static_cast<unsigned>(p.num_experts);
  return dispatch(p.dtype, [&]<class T>() {
    return launch(row_sums_kernel<T>, LaunchConfig{grid, kThreads, 0, stream}, sums);
  });
}

}  // namespace

Status grad_weights_cuda(const FusedExpertsBackwardParams& p, const float* partial, void* stream) {
  const int64_t pairs = p.num_tokens * p.top_k;
  if (pairs == 0) return Status::ok();
  KIMI_RETURN_IF_ERROR(launch(grad_weights_kernel,
                              LaunchConfig{blocks_of(pairs), kThreads, 0, stream}, partial,
                              p.row_map, p.grad_weights, pairs, ceil_div(p.width, kPartial)));
  if (!p.b_down) return Status::ok();
  return dispatch(p.dtype, [&]<class T>() {
    return launch(bias_dots_kernel<T>,
                  LaunchConfig{blocks_of(pairs * kWarpSize), kThreads, 0, stream}, p, pairs);
  });
}

Status row_sums_cuda(const FusedExpertsBackwardParams& p, const void* x, int64_t cols, void* out,
                     void* stream) {
  return sum_rows(p, {x, cols, cols, 0, nullptr, nullptr, 1, nullptr, out}, stream);
}

Status weighted_token_sums_cuda(const FusedExpertsBackwardParams& p, void* out, void* stream) {
  return sum_rows(p, {p.dy, p.dy_stride, p.hidden, 0, nullptr, p.source, 1, p.weights, out},
                  stream);
}

}  // namespace kimi::experts
