// SPDX-License-Identifier: MIT
// The gate on CUDA (any sm_80+): one warp a token, logits read once, everything in registers.
//
//   lane l owns experts l, l+32, l+64, ...      coalesced loads; fixes the order of softmax's sum
//   key    order-preserving int32 of s + bias   excluded < all keys; ties: the lower id
//   round  lane's best -> redux.max key -> redux.min id -> that lane shows its next
//          a lane keeps its two best at hand and looks through its keys again after the second win
//   slot k is lane k: it fetches logit indices[k] again (in L1) and scores it for the weight
//   counts: a histogram for each block in shared memory, then integer atomics: any order, same sum
//
// With groups a warp also lays its keys out in shared memory and picks groups the same way.
// Predicted for an H200 (4.2 TB/s; 132 SMs at 1.75 GHz, 4 warp instructions a clock):
//   32768 x 384 fp32, top 8, sigmoid: 50 MB, 12 us by bytes. SASS for sm_80 has 59 instructions for
//   each of the warp's 12 x 32 logits (12 load and clean it, 32 score it, 5 make the key, 10 keep
//   the best two); with about 350 for the rest of a token: 35 M warp instructions, 37 us:
//   issue-bound. An H100 takes 59 us in a graph: 2.9 instructions a clock, 1225 a token.
//   Two-byte logits are loaded one by one: in pairs a lane would own neighbours, and softmax would
//   sum in another order than the other engines.
#include <algorithm>
#include <cfloat>
#include <cstdint>

#include "common/dtype.h"
#include "device/atomic.cuh"
#include "topk_gate/score.cuh"

namespace kimi {
namespace {

using namespace gate;

constexpr int32_t kNoId = INT32_MAX;

// ---- selection: descending keys, lower id first ------------------------------------------------

struct Pick {
  int32_t key, id;
  /// Whether this one comes after `other` in the order of selection.
  __device__ bool after(Pick other) const {
    return key < other.key || (key == other.key && id > other.id);
  }
};

// The first of the warp's picks, known to every lane.
__device__ inline Pick warp_first(Pick mine) {
  const int32_t key = warp_max(mine.key);
  return {key, warp_min(mine.key == key ? mine.id : kNoId)};
}

// The first of keys[0..n) in shared memory that comes after `previous`.
__device__ inline Pick warp_next(const int32_t* keys, int n, Pick previous) {
  Pick best{kExcluded, kNoId};
  for (int i = lane_id(); i < n; i += kWarpSize) {
    const Pick candidate{keys[i], i};
    if (candidate.after(previous) && candidate.key > best.key) best = candidate;
  }
  return warp_first(best);
}

struct BestTwo {
  Pick first{kExcluded, kNoId}, second{kExcluded, kNoId};
  /// Ids come in ascending order, so an equal key stays behind.
  __device__ void offer(Pick candidate) {
    if (candidate.key > first.key) {
      second = first;
      first = candidate;
    } else if (candidate.key > second.key) {
      second = candidate;
    }
  }
};

// Excludes the experts of all but the best groups. `keys` [E] and `group_keys` [num_groups] are the
// warp's own shared memory.
template <int kValues>
__device__ void exclude_groups(const TopkGateParams& p, int32_t (&key)[kValues], int32_t* keys,
                               int32_t* group_keys) {
  const int lane = lane_id(), size = p.num_experts / p.num_groups;
  warp_barrier();  // the previous token's readers are done
#pragma unroll
  for (int j = 0; j < kValues; ++j)
    if (lane + 32 * j < p.num_experts) keys[lane + 32 * j] = key[j];
  warp_barrier();
  for (int group = 0; group < p.num_groups; ++group) {
    Pick pick{INT32_MAX, 0};
    float sum = 0.0f;
    for (int i = 0; i < p.group_score_topk; ++i) {
      pick = warp_next(keys + group * size, size, pick);
      sum = i == 0 ? value_of_key(pick.key) : add_rn(sum, value_of_key(pick.key));
    }
    if (lane == 0) group_keys[group] = sort_key(sum);
  }
  warp_barrier();
  Pick last{INT32_MAX, 0};
  for (int i = 0; i < p.topk_groups; ++i) last = warp_next(group_keys, p.num_groups, last);
#pragma unroll
  for (int j = 0; j < kValues; ++j) {
    const int group = std::min(lane + 32 * j, p.num_experts - 1) / size;
    if (Pick{group_keys[group], group}.after(last)) key[j] = kExcluded;
  }
}

// ---- forward -----------------------------------------------------------------------------------

// Blocks of a multiprocessor that the registers must leave room for.
constexpr int least_blocks(int values) { return values <= 8 ? 4 : values <= 16 ? 3 : 2; }

// kValues * 32 >= E. Dynamic shared memory: int32 histogram [E]; with groups, for each warp keys
// [E] and group keys [num_groups].
template <class T, int kValues>
__global__ void __launch_bounds__(kWarps* kWarpSize, least_blocks(kValues))
    topk_gate_kernel(const __grid_constant__ TopkGateParams p) {
  constexpr bool kBiasInRegisters = kValues <= 12;  // beyond, they would cost resident warps
  KIMI_SHARED(int32_t, histogram);
  const int lane = lane_id(), num_experts = p.num_experts;
  // Without a bias + 0 changes nothing, and there is no branch between the experts.
  const auto bias_of = [&, has_bias = p.expert_bias != nullptr](int e) {
    return has_bias && e < num_experts ? p.expert_bias[e] : 0.0f;
  };
  float bias[kBiasInRegisters ? kValues : 1];
  if constexpr (kBiasInRegisters)
#pragma unroll
    for (int j = 0; j < kValues; ++j) bias[j] = bias_of(lane + 32 * j);
  int32_t* keys = histogram + num_experts + warp_id() * (num_experts + p.num_groups);
  for (int e = static_cast<int>(threadIdx.x); e < num_experts; e += static_cast<int>(blockDim.x))
    histogram[e] = 0;
  __syncthreads();

  const int64_t stride = int64_t{gridDim.x} * kWarps;
  for (int64_t t = int64_t{blockIdx.x} * kWarps + warp_id(); t < p.num_tokens; t += stride) {
    float* weights = p.weights + t * p.top_k;
    int32_t* indices = p.indices + t * p.top_k;
    if (p.valid && !p.valid[t]) {
      if (lane < p.top_k) weights[lane] = 0.0f;
      if (lane < p.top_k) indices[lane] = -1;
      continue;
    }
    const T* logits = static_cast<const T*>(p.logits) + t * p.logits_stride;
    float z[kValues];
    bool valid_logit[kValues];  // folds into one mask register
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      const int e = lane + 32 * j;
      z[j] = e < num_experts ? to_float(logits[e]) : 0.0f;
    }
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      valid_logit[j] = z[j] == z[j];
      z[j] = clean<CudaOps>(z[j]);
    }
    RowScale row;
    if (p.score_function == KIMI_SCORE_SOFTMAX) {
      float largest = -FLT_MAX;
#pragma unroll
      for (int j = 0; j < kValues; ++j)
        if (lane + 32 * j < num_experts) largest = fmaxf(largest, z[j]);
      row = softmax_scale(largest, [&](float peak) {
        float sum = 0.0f;
#pragma unroll
        for (int j = 0; j < kValues; ++j)
          if (lane + 32 * j < num_experts)
            sum = add_rn(sum, softmax_numerator<CudaOps>(z[j], peak));
        return sum;
      });
    }
    int32_t key[kValues];
    with_score(p.score_function, row, [&](auto score_of) {
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        const int e = lane + 32 * j;
        const float choice =
            add_rn(score_of(z[j]), kBiasInRegisters ? bias[kBiasInRegisters ? j : 0] : bias_of(e));
        const int32_t ordered = sort_key(valid_logit[j] ? choice : -INFINITY);
        key[j] = e < num_experts ? ordered : kExcluded;
      }
    });
    if (p.num_groups > 1) exclude_groups(p, key, keys, keys + num_experts);

    BestTwo best;
#pragma unroll
    for (int j = 0; j < kValues; ++j) best.offer({key[j], lane + 32 * j});
    int32_t chosen = 0;  // of slot `lane`
    for (int slot = 0; slot < p.top_k; ++slot) {
      const Pick pick = warp_first(best.first);
      if (lane == slot) chosen = pick.id;
      if (lane != pick.id % kWarpSize) continue;
      best = {best.second, {kExcluded, kNoId}};
      if (best.first.key != kExcluded) continue;
#pragma unroll
      for (int j = 0; j < kValues; ++j)
        if (const Pick candidate{key[j], lane + 32 * j}; candidate.after(pick))
          best.offer(candidate);
    }

    float u = 0.0f, total = 0.0f;
    if (lane < p.top_k) u = score(clean<CudaOps>(to_float(logits[chosen])), p.score_function, row);
    for (int slot = 0; slot < p.top_k; ++slot) total = add_rn(total, warp_broadcast(u, slot));
    const float scale = p.renormalize
                            ? div_rn(p.scaling_factor, add_rn(total, KIMI_TOPK_GATE_EPSILON))
                            : p.scaling_factor;
    if (lane < p.top_k) {
      weights[lane] = mul_rn(u, scale);
      indices[lane] = chosen;
      atomic_add(&histogram[chosen], 1);
    }
  }

  __syncthreads();
  for (int e = static_cast<int>(threadIdx.x); e < num_experts; e += static_cast<int>(blockDim.x))
    if (histogram[e] != 0) atomic_add(&p.tokens_per_expert[e], histogram[e]);
}

// ---- launcher ----------------------------------------------------------------------------------

// The smallest kernel that holds a row: 2, 8, 12, 28 values a lane are 64, 256, 384, 896 experts.
template <class T, int kValues, int... kLarger>
Status launch_smallest(const TopkGateParams& p, size_t smem_bytes, void* stream) {
  if constexpr (sizeof...(kLarger) > 0)
    if (p.num_experts > kValues * kWarpSize)
      return launch_smallest<T, kLarger...>(p, smem_bytes, stream);
  return launch_warp_per_token(topk_gate_kernel<T, kValues>, p, smem_bytes, stream);
}

}  // namespace

Status topk_gate_cuda(const TopkGateParams& p, void* stream) {
  const size_t histogram = sizeof(int32_t) * static_cast<size_t>(p.num_experts);
  KIMI_RETURN_IF_ERROR(memset_async(p.tokens_per_expert, 0, histogram, stream));
  if (p.num_tokens == 0) return Status::ok();
  const size_t keys =
      p.num_groups > 1 ? sizeof(int32_t) * kWarps * (p.num_experts + p.num_groups) : 0;
  return dispatch(p.logits_dtype, [&]<class T>() {
    return launch_smallest<T, 2, 4, 8, 12, 16, 28, 32>(p, histogram + keys, stream);
  });
}

}  // namespace kimi
