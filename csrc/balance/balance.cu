// SPDX-License-Identifier: MIT
// The bias rule and the losses on CUDA (any sm_80+): one block a run of 64 tokens, one warp a
// token.
//
//   balance loss  warp w scores token 8 b + w of the run into row w of shared memory (lane l owns
//                 experts l, l+32, ...: the order of the row's sum); then the block's threads, each
//                 with its own experts, add the eight rows to the run's sum in token order. Two
//                 buffers of rows: one barrier for eight tokens. Ids go to a histogram in shared
//                 memory, then by integer atomics to the sequence's counts.
//                 second kernel: a block a sequence adds its runs; third: one warp adds sequences.
//   bias          one warp, integers.
//
// Predicted for an H200, not measured (4.2 TB/s, 132 SMs at 1.75 GHz, 4 warp instructions a clock),
// 32768 x 384 fp32 in sequences of 4096: 50 MB, 12 us by bytes; about 35 warp instructions for each
// of a token's 12 x 32 logits, 15 us; with the short kernels 22 us. At 4096 tokens 64 blocks leave
// half of the SMs idle: 10 us.
#include <algorithm>
#include <cfloat>
#include <cstdint>

#include "balance/balance.cuh"
#include "device/atomic.cuh"

namespace kimi {
namespace {

using namespace balance;

constexpr int kMaxPerThread = KIMI_TOPK_GATE_MAX_EXPERTS / kThreads;

// ---- sequence_balance_loss ---------------------------------------------------------------------

struct LossArguments : SequenceBalanceLossParams {
  int64_t length, runs;  // tokens and runs of a sequence
  float scale;
};

// Scores of one row into s [E] by one warp; 1 / D_t.
template <class T>
__device__ float score_row(Row<T> row, kimi_score_function function, float* s) {
  RowScale scale;
  if (function == KIMI_SCORE_SOFTMAX) {
    float largest = -FLT_MAX;
    for (int e = lane_id(); e < row.num_experts; e += kWarpSize) largest = fmaxf(largest, row[e]);
    scale = softmax_scale(largest, [&](float peak) {
      float sum = 0.0f;
      for (int e = lane_id(); e < row.num_experts; e += kWarpSize)
        sum = add_rn(sum, softmax_numerator<CudaOps>(row[e], peak));
      return sum;
    });
  }
  float sum = 0.0f;
  with_score(function, scale, [&](auto score_of) {
#pragma unroll 4
    for (int e = lane_id(); e < row.num_experts; e += kWarpSize) {
      s[e] = score_of(row[e]);
      sum = add_rn(sum, s[e]);
    }
  });
  return div_rn(1.0f, add_rn(warp_sum(sum), balance::kShareEpsilon));
}

// Dynamic shared memory: scores [2][kWarps][E]; histogram [E].
template <class T>
__global__ void __launch_bounds__(kThreads)
    sum_shares_kernel(const __grid_constant__ LossArguments p) {
  KIMI_SHARED(float, scores);
  KIMI_STATIC_SHARED(float, inverse, 2 * kWarps);
  const int num_experts = p.num_experts, thread = static_cast<int>(threadIdx.x);
  int32_t* histogram = reinterpret_cast<int32_t*>(scores + 2 * kWarps * num_experts);
  const int64_t sequence = blockIdx.x / p.runs;
  const int64_t offset = blockIdx.x % p.runs * kRun;  // of the run in its sequence
  const int64_t begin = sequence * p.length + offset;
  const int count = static_cast<int>(std::min<int64_t>(kRun, p.length - offset));
  for (int e = thread; e < num_experts; e += kThreads) histogram[e] = 0;
  __syncthreads();
  for (int64_t i = begin * p.top_k + thread; i < (begin + count) * p.top_k; i += kThreads)
    if (const int id = p.indices[i]; id >= 0 && id < num_experts) atomic_add(&histogram[id], 1);

  float sum[kMaxPerThread] = {};
  for (int first = 0, buffer = 0; first < count; first += kWarps, buffer ^= 1) {
    const int mine = first + warp_id();
    float* rows = scores + buffer * kWarps * num_experts;
    if (mine < count) {
      const T* logits = static_cast<const T*>(p.logits) + (begin + mine) * p.logits_stride;
      const float result =
          score_row(Row<T>{logits, num_experts}, p.score_function, rows + warp_id() * num_experts);
      if (lane_id() == 0) inverse[buffer * kWarps + warp_id()] = result;
    }
    __syncthreads();  // the other buffer's readers came to it after they had read
    const int rows_here = std::min(int{kWarps}, count - first);
#pragma unroll
    for (int j = 0; j < kMaxPerThread; ++j) {
      const int e = thread + j * kThreads;
      if (e >= num_experts) break;
      for (int w = 0; w < rows_here; ++w)
        sum[j] = add_rn(sum[j], mul_rn(rows[w * num_experts + e], inverse[buffer * kWarps + w]));
    }
  }
  float* out = static_cast<float*>(p.workspace) + int64_t{blockIdx.x} * num_experts;
#pragma unroll
  for (int j = 0; j < kMaxPerThread; ++j) {
    const int e = thread + j * kThreads;
    if (e >= num_experts) break;
    out[e] = sum[j];
    if (histogram[e] != 0)
      atomic_add(&p.tokens_per_expert[sequence * num_experts + e], histogram[e]);
  }
}

// One block a sequence: its runs' sums in order, weighed with its counts, to terms [N] behind the
// runs' sums. Dynamic shared memory: products [E].
__global__ void __launch_bounds__(kThreads)
    weigh_shares_kernel(const __grid_constant__ LossArguments p) {
  KIMI_SHARED(float, products);
  const int64_t sequence = blockIdx.x;
  float* sums = static_cast<float*>(p.workspace);
  const float* mine = sums + sequence * p.runs * p.num_experts;
  for (int e = static_cast<int>(threadIdx.x); e < p.num_experts; e += kThreads) {
    float sum = mine[e];
#pragma unroll 16
    for (int64_t run = 1; run < p.runs; ++run) sum = add_rn(sum, mine[run * p.num_experts + e]);
    const int32_t count = p.tokens_per_expert[sequence * p.num_experts + e];
    products[e] = mul_rn(static_cast<float>(count), sum);
  }
  __syncthreads();
  if (warp_id() != 0) return;
  float partial = 0.0f;
  for (int e = lane_id(); e < p.num_experts; e += kWarpSize) partial = add_rn(partial, products[e]);
  partial = warp_sum(partial);
  if (lane_id() == 0) sums[p.num_sequences * p.runs * p.num_experts + sequence] = partial;
}

// One warp: the loss from the sequences' terms.
__global__ void __launch_bounds__(kWarpSize)
    sum_sequences_kernel(const __grid_constant__ LossArguments p) {
  const float* terms =
      static_cast<const float*>(p.workspace) + p.num_sequences * p.runs * p.num_experts;
  float partial = 0.0f;
  if (p.runs > 0)
    for (int64_t i = lane_id(); i < p.num_sequences; i += kWarpSize)
      partial = add_rn(partial, terms[i]);
  partial = warp_sum(partial);
  if (lane_id() == 0) *p.loss = mul_rn(p.scale, partial);
}

// ---- update_expert_bias ------------------------------------------------------------------------

__device__ inline int64_t warp_add(int64_t value) {
#pragma unroll
  for (int half = 16; half > 0; half /= 2) value += warp_exchange(value, half);
  return value;
}

template <class Count>
__global__ void __launch_bounds__(kWarpSize)
    update_expert_bias_kernel(const __grid_constant__ UpdateExpertBiasParams p) {
  const Count* counts = static_cast<const Count*>(p.tokens_per_expert);
  int64_t total = 0, sum = 0;
  for (int64_t e = lane_id(); e < p.num_experts; e += kWarpSize) total += counts[e];
  total = warp_add(total);
  const auto direction = [&](int64_t e) {
    const int64_t share = p.num_experts * int64_t{counts[e]};
    return static_cast<int>(total > share) - static_cast<int>(total < share);
  };
  for (int64_t e = lane_id(); e < p.num_experts; e += kWarpSize) sum += direction(e);
  sum = warp_add(sum);
  const float mean =
      p.centered ? div_rn(static_cast<float>(sum), static_cast<float>(p.num_experts)) : 0.0f;
  for (int64_t e = lane_id(); e < p.num_experts; e += kWarpSize) {
    const float step = sub_rn(static_cast<float>(direction(e)), mean);
    p.bias[e] = add_rn(p.bias[e], mul_rn(p.rate, step));
  }
}

}  // namespace

// ---- launchers ---------------------------------------------------------------------------------

Status update_expert_bias_cuda(const UpdateExpertBiasParams& p, void* stream) {
  if (p.num_experts == 0) return Status::ok();
  return launch(
      p.counts_are_int64 ? update_expert_bias_kernel<int64_t> : update_expert_bias_kernel<int32_t>,
      LaunchConfig{dim3(1), dim3(kWarpSize), 0, stream}, p);
}

Status sequence_balance_loss_cuda(const SequenceBalanceLossParams& params, void* stream) {
  LossArguments p{params, 0, 0, balance::loss_scale(params)};
  p.length = p.num_tokens / p.num_sequences;
  p.runs = balance::runs(p.length);
  const size_t row = sizeof(float) * static_cast<size_t>(p.num_experts);
  const size_t counts = row * static_cast<size_t>(p.num_sequences);
  KIMI_RETURN_IF_ERROR(memset_async(p.tokens_per_expert, 0, counts, stream));
  if (p.runs > 0) {
    const dim3 blocks(static_cast<unsigned>(p.num_sequences * p.runs));
    const LaunchConfig shares{blocks, dim3(kThreads), row * (2 * kWarps + 1), stream};
    KIMI_RETURN_IF_ERROR(dispatch(
        p.logits_dtype, [&]<class T>() { return launch(sum_shares_kernel<T>, shares, p); }));
    const dim3 sequences(static_cast<unsigned>(p.num_sequences));
    KIMI_RETURN_IF_ERROR(
        launch(weigh_shares_kernel, LaunchConfig{sequences, dim3(kThreads), row, stream}, p));
  }
  return launch(sum_sequences_kernel, LaunchConfig{dim3(1), dim3(kWarpSize), 0, stream}, p);
}

}  // namespace kimi
