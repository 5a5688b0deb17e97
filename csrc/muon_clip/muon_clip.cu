// SPDX-License-Identifier: MIT
// The passes on CUDA (any sm_80+): a block of 256 threads for 2^13 elements of one tensor, 8
// elements a thread at a time, 16 bytes an access where the addresses allow it. Tensors whose
// gradient is not finite cost the reading of their flags.
//
// Predicted for an H200, not measured (4.2 TB/s): by bytes, 10^9 elements in fp32 take momentum
// 3.8 ms (16 bytes each), update 2.9 ms (12), adamw 6.7 ms (28).
#include <cstdint>
#include <vector>

#include "muon_clip/muon_clip.cuh"

namespace kimi {
namespace {

using namespace muon_clip_cuda;

constexpr int kThreads = 256;

// ---- momentum ----------------------------------------------------------------------------------

struct MomentumNumbers {
  Momentum momentum;
  const double* squares;
  kimi_dtype grad_dtype, buffer_dtype;
};
struct MomentumEntry {
  const void* grad;
  void* buffer;
  float* update;
  int64_t size, first_block;
  int32_t first_piece, end_piece;
};
using MomentumTable = Table<MomentumNumbers, MomentumEntry>;

__global__ void __launch_bounds__(kThreads)
    momentum_kernel(const __grid_constant__ MomentumTable table) {
  const MomentumEntry& e = table.of(blockIdx.x);
  const MomentumNumbers& n = table.numbers;
  const bool alive = moves(n.squares, e.first_piece, e.end_piece);
  const bool wide = aligned16(e.grad, e.buffer, e.update);
  const int64_t begin = (blockIdx.x - e.first_block) * kBlock;
  const int64_t end = std::min(e.size, begin + kBlock);
  for (int64_t i = begin + 8 * threadIdx.x; i < end; i += 8 * kThreads) {
    const int count = static_cast<int>(std::min<int64_t>(8, end - i));
    float update[8] = {};
    if (alive) {
      float grad[8], buffer[8];
      load8(e.grad, n.grad_dtype, i, grad, count, wide);
      load8(e.buffer, n.buffer_dtype, i, buffer, count, wide);
#pragma unroll
      for (int k = 0; k < 8; ++k) update[k] = momentum_of<CudaOps>(n.momentum, grad[k], buffer[k]);
      store8(e.buffer, n.buffer_dtype, i, buffer, count, wide);
    }
    kimi::store8(e.update + i, update, count, wide);
  }
}

// ---- update ------------------------------------------------------------------------------------

struct UpdateNumbers {
  const double *lr, *weight_decay, *squares;
  double decay;
  bool cautious;
  kimi_dtype param_dtype, direction_dtype;
};
struct UpdateEntry {
  void* param;
  const void* direction;
  void* copy;
  int64_t cols, octets, units;  // octets: runs of 8 elements of a row; units: of all rows
  int64_t param_stride, direction_stride, first_block;
  double rate;
  int32_t first_piece, end_piece;
};
using UpdateTable = Table<UpdateNumbers, UpdateEntry>;
constexpr int64_t kUnits = kBlock / 8;  // of a block

__global__ void __launch_bounds__(kThreads)
    update_kernel(const __grid_constant__ UpdateTable table) {
  const UpdateEntry& e = table.of(blockIdx.x);
  const UpdateNumbers& n = table.numbers;
  if (!moves(n.squares, e.first_piece, e.end_piece)) return;
  const Decay decay = decay_of(n.decay, n.lr, n.weight_decay, n.cautious);
  const float rate = rate_of(e.rate, n.lr);
  const bool wide = aligned16(e.param, e.direction, e.copy) && e.param_stride % 8 == 0 &&
                    e.direction_stride % 8 == 0;
  const int64_t begin = (blockIdx.x - e.first_block) * kUnits;
  const int64_t end = std::min(e.units, begin + kUnits);
  for (int64_t u = begin + threadIdx.x; u < end; u += kThreads) {
    const int64_t row = e.units == e.octets ? 0 : u / e.octets, col = 8 * (u - row * e.octets);
    const int count = static_cast<int>(std::min<int64_t>(8, e.cols - col));
    const int64_t i = row * e.param_stride + col;
    float param[8], direction[8];
    load8(e.param, n.param_dtype, i, param, count, wide);
    load8(e.direction, n.direction_dtype, row * e.direction_stride + col, direction, count, wide);
#pragma unroll
    for (int k = 0; k < 8; ++k) param[k] = updated<CudaOps>(decay, rate, param[k], direction[k]);
    store8(e.param, n.param_dtype, i, param, count, wide);
    if (e.copy) kimi::store8(static_cast<bf16*>(e.copy) + i, param, count, wide);
  }
}

// ---- adamw -------------------------------------------------------------------------------------

struct AdamwEntry {
  void* param;
  const void* grad;
  float *exp_avg, *exp_avg_sq, *step;
  int64_t size, first_block;
  int32_t first_piece, end_piece;
};
using AdamwTable = Table<AdamwParams, AdamwEntry>;

// Before the others read the counts.
__global__ void __launch_bounds__(kThreads)
    count_steps_kernel(const __grid_constant__ AdamwTable table) {
  const int t = static_cast<int>(blockIdx.x * kThreads + threadIdx.x);
  if (t >= table.count) return;
  const AdamwEntry& e = table.entries[t];
  if (moves(table.numbers.squares, e.first_piece, e.end_piece)) *e.step += 1.0f;
}

__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ AdamwTable table) {
  KIMI_STATIC_SHARED(Moments, moments, 1);
  const AdamwEntry& e = table.of(blockIdx.x);
  const AdamwParams& p = table.numbers;
  if (!moves(p.squares, e.first_piece, e.end_piece)) return;
  if (threadIdx.x == 0) moments[0] = moments_of(p, *e.step);
  __syncthreads();
  const Moments m = moments[0];
  const bool wide = aligned16(e.param, e.grad, e.exp_avg, e.exp_avg_sq);
  const int64_t begin = (blockIdx.x - e.first_block) * kBlock;
  const int64_t end = std::min(e.size, begin + kBlock);
  for (int64_t i = begin + 8 * threadIdx.x; i < end; i += 8 * kThreads) {
    const int count = static_cast<int>(std::min<int64_t>(8, end - i));
    float param[8], grad[8], first[8], second[8];
    load8(e.param, p.param_dtype, i, param, count, wide);
    load8(e.grad, p.grad_dtype, i, grad, count, wide);
    kimi::load8(e.exp_avg + i, first, count, wide);
    kimi::load8(e.exp_avg_sq + i, second, count, wide);
#pragma unroll
    for (int k = 0; k < 8; ++k)
      param[k] = adamw_of<CudaOps>(m, param[k], grad[k], first[k], second[k]);
    store8(e.param, p.param_dtype, i, param, count, wide);
    kimi::store8(e.exp_avg + i, first, count, wide);
    kimi::store8(e.exp_avg_sq + i, second, count, wide);
  }
}

template <class Entry>
void set_pieces(Entry& e, const double* squares, const int64_t* pieces, int64_t t) {
  e.first_piece = squares ? static_cast<int32_t>(pieces[2 * t]) : 0;
  e.end_piece = squares ? static_cast<int32_t>(pieces[2 * t + 1]) : 0;
}

}  // namespace

Status muon_momentum_cuda(const MuonMomentumParams& p, void* stream) {
  MomentumTable table{
      {muon_clip_math::momentum_of(p), p.squares, p.grad_dtype, p.buffer_dtype}, {}, 0};
  const auto fill = [&](MomentumEntry& e, int64_t t) {
    e = {p.grads[t], p.buffers[t], p.updates[t], p.sizes[t], 0, 0, 0};
    set_pieces(e, p.squares, p.pieces, t);
    return blocks_of(e.size);
  };
  return in_tables(table, p.count, false, fill, [&](const MomentumTable& full, int64_t blocks) {
    return launch(momentum_kernel, grid(blocks, kThreads, stream), full);
  });
}

Status muon_update_cuda(const MuonUpdateParams& p, void* stream) {
  UpdateTable table{
      {p.lr, p.weight_decay, p.squares, p.decay, p.cautious != 0, p.param_dtype, p.direction_dtype},
      {},
      0};
  const auto fill = [&](UpdateEntry& e, int64_t t) {
    const int64_t* s = p.shapes + 4 * t;
    const bool dense = s[2] == s[1] && s[3] == s[1];  // rows that follow each other are one
    const int64_t rows = dense ? (s[1] > 0 ? 1 : 0) : s[0], cols = dense ? s[0] * s[1] : s[1];
    const int64_t octets = (cols + 7) / 8;
    e = {p.params[t],
         p.directions[t],
         p.copies ? p.copies[t] : nullptr,
         cols,
         octets,
         rows * octets,
         dense ? 0 : s[2],
         dense ? 0 : s[3],
         0,
         p.rates[t],
         0,
         0};
    set_pieces(e, p.squares, p.pieces, t);
    return (e.units + kUnits - 1) / kUnits;
  };
  return in_tables(table, p.count, false, fill, [&](const UpdateTable& full, int64_t blocks) {
    return launch(update_kernel, grid(blocks, kThreads, stream), full);
  });
}

Status adamw_cuda(const AdamwParams& p, void* stream) {
  if (p.measure) {
    std::vector<int64_t> places(static_cast<size_t>(p.count));
    for (int64_t t = 0; t < p.count; ++t) places[static_cast<size_t>(t)] = p.pieces[2 * t];
    SquaresParams measured{};
    measured.x = p.grads;
    measured.sizes = p.sizes;
    measured.places = places.data();
    measured.squares = p.squares;
    measured.workspace = p.workspace;
    measured.workspace_bytes = p.workspace_bytes;
    measured.count = p.count;
    measured.dtype = p.grad_dtype;
    KIMI_RETURN_IF_ERROR(sum_squares(measured, true, stream));
  }
  AdamwTable table{p, {}, 0};
  const auto fill = [&](AdamwEntry& e, int64_t t) {
    e = {p.params[t], p.grads[t], p.exp_avgs[t], p.exp_avg_sqs[t], p.steps[t], p.sizes[t], 0, 0, 0};
    set_pieces(e, p.squares, p.pieces, t);
    return blocks_of(e.size);
  };
  return in_tables(table, p.count, true, fill, [&](const AdamwTable& full, int64_t blocks) {
    const int64_t counters = (full.count + kThreads - 1) / kThreads;
    KIMI_RETURN_IF_ERROR(launch(count_steps_kernel, grid(counters, kThreads, stream), full));
    if (blocks == 0) return Status::ok();
    return launch(adamw_kernel, grid(blocks, kThreads, stream), full);
  });
}

}  // namespace kimi
