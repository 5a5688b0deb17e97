// SPDX-License-Identifier: MIT
// The bias rule, the balance loss and its counts on CUDA (any sm_80+).
//
//   counts        a lane a pair; lanes with one key (sequence, expert) add once, by integer atomics
//   balance loss  a block a run of 64 tokens, a warp a token: lane l scores experts l, l+32, ... and
//                 sums scores and count-weighed scores; thread 0 adds the run's terms in token order.
//                 second kernel: one block fetches the runs' sums, its first thread adds them in order
//   bias          one warp, integers.
//
// Predicted for an H200, not measured (4.2 TB/s, 132 SMs at 1.75 GHz, 4 warp instructions a clock),
// 32768 x 384 fp32, K 8: 50 MB, 12 us by bytes; about 35 warp instructions for each of a token's
// 12 x 32 logits, 15 us; counts 1 MB and 262144 pairs, 4 us; with the short kernels 24 us.
#include <algorithm>
#include <cstdint>

#include "balance/balance.cuh"
#include "device/atomic.cuh"

namespace kimi {
namespace {

using namespace balance;

// ---- sequence_counts ---------------------------------------------------------------------------

// Adds 1 at `address`[key] for every lane with a key of 0 or more: one atomic for lanes that agree.
__device__ inline void count_key(int32_t* address, int64_t key) {
  const uint32_t same = warp_match(key);
  if (key >= 0 && (same & ((1u << lane_id()) - 1)) == 0) atomic_add(&address[key], __popc(same));
}

__global__ void __launch_bounds__(kThreads)
    sequence_counts_kernel(const __grid_constant__ SequenceCountsParams p) {
  const int64_t pairs = p.num_tokens * p.top_k, stride = int64_t{gridDim.x} * kThreads;
  for (int64_t first = int64_t{blockIdx.x} * kThreads; first < pairs; first += stride) {
    const int64_t pair = first + threadIdx.x, t = pair / p.top_k;
    int64_t sequence = -1, key = -1;
    if (pair < pairs) {
      sequence = sequence_of(p, t);
      const int32_t id = p.indices[pair];
      if (sequence >= 0 && id >= 0 && id < p.num_experts) key = sequence * p.num_experts + id;
    }
    count_key(p.tokens_per_expert, key);
    count_key(p.sequence_tokens, pair == t * p.top_k ? sequence : -1);  // its first pair's lane
  }
}

// ---- sequence_balance_loss ---------------------------------------------------------------------

struct LossArguments : SequenceBalanceLossParams {
  float scale;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    sum_terms_kernel(const __grid_constant__ LossArguments p) {
  KIMI_STATIC_SHARED(float, terms, kRun);
  const int64_t begin = int64_t{blockIdx.x} * kRun;
  const int count = static_cast<int>(std::min<int64_t>(kRun, p.num_tokens - begin));
  for (int i = warp_id(); i < count; i += kWarps) {
    const int64_t t = begin + i, sequence = sequence_of(p, t);
    float term = 0.0f;
    if (sequence >= 0) {
      const Row<T> row{static_cast<const T*>(p.logits) + t * p.logits_stride, p.num_experts};
      const int32_t* counts = p.tokens_per_expert + sequence * p.num_experts;
      const float share = reciprocal_length<CudaOps>(p.sequence_tokens[sequence]);
      term = mul_rn(mean_of(row, p.score_function, counts, [](int, float, float) {}).mean,
                    mul_rn(share, share));
    }
    if (lane_id() == 0) terms[i] = term;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  float sum = 0.0f;
#pragma unroll 8
  for (int i = 0; i < count; ++i) sum = add_rn(sum, terms[i]);
  static_cast<float*>(p.workspace)[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    balance_loss_kernel(const __grid_constant__ LossArguments p) {
  KIMI_STATIC_SHARED(float, tile, kThreads);
  const float sum =
      sum_runs(static_cast<const float*>(p.workspace), balance::runs(p.num_tokens), tile);
  if (threadIdx.x == 0) *p.loss = mul_rn(p.scale, sum);
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

Status sequence_counts_cuda(const SequenceCountsParams& p, void* stream) {
  const size_t sequences = sizeof(int32_t) * static_cast<size_t>(p.num_sequences);
  KIMI_RETURN_IF_ERROR(memset_async(p.sequence_tokens, 0, sequences, stream));
  const size_t counts = sequences * static_cast<size_t>(p.num_experts);
  KIMI_RETURN_IF_ERROR(memset_async(p.tokens_per_expert, 0, counts, stream));
  if (p.num_tokens == 0) return Status::ok();
  const int64_t blocks = ceil_div(p.num_tokens * p.top_k, kThreads);
  const dim3 grid(static_cast<unsigned>(
      std::min<int64_t>(blocks, resident_blocks(sequence_counts_kernel, kThreads, 0))));
  return launch(sequence_counts_kernel, LaunchConfig{grid, dim3(kThreads), 0, stream}, p);
}

Status sequence_balance_loss_cuda(const SequenceBalanceLossParams& params, void* stream) {
  const LossArguments p{params, balance::loss_scale(params)};
  if (p.num_tokens > 0) {
    const dim3 blocks(static_cast<unsigned>(balance::runs(p.num_tokens)));
    KIMI_RETURN_IF_ERROR(dispatch(p.logits_dtype, [&]<class T>() {
      return launch(sum_terms_kernel<T>, LaunchConfig{blocks, dim3(kThreads), 0, stream}, p);
    }));
  }
  return launch(balance_loss_kernel, LaunchConfig{dim3(1), dim3(kThreads), 0, stream}, p);
}

}  // namespace kimi
