// SPDX-License-Identifier: MIT
// clip_rows on CUDA: one launch for the weights of all layers, whose table is a parameter.
//
//   grid (16, weights)   a warp looks at 32 heads at a time, a lane each; rows of the heads that
//                        are clipped are shared out between the 128 warps of the weight
//   block (0, i)         also writes gamma of layer i
//
// Without a head above tau a block reads 4 bytes a head and ends: *predicted* 6 us for 61 layers
// of K2 with masters (3904 blocks, 528 at a time on an H100, 1500 cycles each). Clipped rows are
// read and written once, 16 bytes a lane. Tables of more than 4 KB are parameters from CUDA 12.1 on
// (drivers from 530).
#include <algorithm>

#include "common/dtype.h"
#include "device/launch.cuh"
#include "device/math.cuh"
#include "device/vec.cuh"
#include "device/warp.cuh"
#include "qk_clip/qk_clip.h"

namespace kimi {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarpSize, kSplit = 16;

struct Layer {
  int32_t first, heads, members;  // first: of max_logits and gamma
};

template <int kLayers_, int kWeights_>
struct Table {
  static constexpr int kLayers = kLayers_, kWeights = kWeights_;
  const float* max_logits;
  float* gamma;
  float tau;
  int32_t num_layers, num_weights;
  kimi_clip_weight weights[kWeights];
  Layer layers[kLayers];
};
using Few = Table<16, 48>;  // 4 KB
#if defined(KIMI_HOST_SIMT)
using Many = Table<20, 60>;  // so that tests need no thousands of blocks, each thread with its copy
#else
using Many = Table<256, 400>;  // 32 KB
#endif
static_assert(sizeof(Few) <= 4096 && sizeof(Many) <= 32764);

template <class T>
__device__ inline void scale_row(T* row, int64_t cols, float factor) {
  const bool wide = reinterpret_cast<uintptr_t>(row) % 16 == 0;
  for (int64_t c = lane_id() * 8; c < cols; c += kWarpSize * 8) {
    const int count = cols - c < 8 ? static_cast<int>(cols - c) : 8;
    float v[8];
    load8(row + c, v, count, wide);
#pragma unroll
    for (float& x : v) x = mul_rn(x, factor);
    store8(row + c, v, count, wide);
  }
}

// The rows of one block, of those that the weight has, that fall to this warp.
__device__ inline void clip_block(const kimi_clip_weight& w, int64_t block, float shared,
                                  float gamma) {
  const int64_t first = block * w.block_rows, end = first + w.shared + w.whole;
  const int64_t last = end < w.first_row + w.rows ? end : w.first_row + w.rows;
  int64_t row = (first > w.first_row ? first : w.first_row) + blockIdx.x * kWarps + warp_id();
  for (; row < last; row += kSplit * kWarps) {
    const float factor = row - first < w.shared ? shared : gamma;
    if (factor == 1.0f) continue;
    const int64_t at = (row - w.first_row) * w.row_stride;
    if (w.dtype == KIMI_FLOAT32)
      scale_row(static_cast<float*>(w.weight) + at, w.cols, factor);
    else if (w.dtype == KIMI_BFLOAT16)
      scale_row(static_cast<bf16*>(w.weight) + at, w.cols, factor);
    else
      scale_row(static_cast<fp16*>(w.weight) + at, w.cols, factor);
  }
}

// Four blocks on a multiprocessor: left to itself ptxas aims at five, and spills.
template <class Table>
__global__ void __launch_bounds__(kThreads, 4) clip_rows_kernel(const __grid_constant__ Table t) {
  const int number = static_cast<int>(blockIdx.y);
  if (blockIdx.x == 0 && number < t.num_layers) {
    const Layer& layer = t.layers[number];
    for (int h = static_cast<int>(threadIdx.x); h < layer.heads; h += kThreads)
      t.gamma[layer.first + h] = gamma_of(t.max_logits + layer.first, h, layer.members, t.tau);
  }
  if (number >= t.num_weights) return;
  const kimi_clip_weight& w = t.weights[number];
  if (w.rows == 0) return;
  const Layer& layer = t.layers[w.layer];
  const int64_t last = (w.first_row + w.rows - 1) / w.block_rows;
#pragma unroll 1
  for (int64_t first = w.first_row / w.block_rows; first <= last; first += kWarpSize) {
    const int64_t block = first + lane_id();
    const float gamma = block > last
                            ? 1.0f
                            : gamma_of(t.max_logits + layer.first, block * (layer.heads / w.blocks),
                                       layer.members, t.tau);
    const float shared = power_of(gamma, w.power);
    for (uint32_t left = warp_ballot(gamma != 1.0f); left != 0; left &= left - 1) {
      const int source = __ffs(static_cast<int>(left)) - 1;
      clip_block(w, first + source, warp_broadcast(shared, source), warp_broadcast(gamma, source));
    }
  }
}

// Queues as many layers as the table holds, from `layer` on, whose maxima begin at `head`; moves
// all three behind them. A layer with more weights than a table holds is queued piece by piece.
template <class Table>
Status launch_table(const ClipRowsParams& p, int64_t& layer, int64_t& weight, int64_t& head,
                    void* stream) {
  Table t{};
  t.max_logits = p.max_logits;
  t.gamma = p.gamma;
  t.tau = p.tau;
  while (layer < p.num_layers && t.num_layers < Table::kLayers) {
    t.layers[t.num_layers] = {static_cast<int32_t>(head), p.layers[layer].heads,
                              p.layers[layer].members};
    while (weight < p.num_weights && p.weights[weight].layer == layer &&
           t.num_weights < Table::kWeights) {
      t.weights[t.num_weights] = p.weights[weight++];
      t.weights[t.num_weights++].layer = t.num_layers;
    }
    ++t.num_layers;
    if (weight < p.num_weights && p.weights[weight].layer == layer) break;  // the table is full
    head += p.layers[layer++].heads;
  }
  const dim3 grid(kSplit, static_cast<unsigned>(std::max(t.num_layers, t.num_weights)));
  return launch(clip_rows_kernel<Table>, LaunchConfig{grid, dim3(kThreads), 0, stream}, t);
}

}  // namespace

Status clip_rows_cuda(const ClipRowsParams& p, void* stream) {
  const bool few = p.num_layers <= Few::kLayers && p.num_weights <= Few::kWeights;
  for (int64_t layer = 0, weight = 0, head = 0; layer < p.num_layers;)
    KIMI_RETURN_IF_ERROR(few ? launch_table<Few>(p, layer, weight, head, stream)
                             : launch_table<Many>(p, layer, weight, head, stream));
  return Status::ok();
}

}  // namespace kimi
