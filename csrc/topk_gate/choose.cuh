// SPDX-License-Identifier: MIT
// One token of the gate by one warp, logits read once, everything in registers.
//
//   lane l owns experts l, l+32, l+64, ...      coalesced loads; fixes the order of softmax's sum
//   key    order-preserving int32 of s + bias   excluded < all keys; ties: the lower id
//   round  lane's best -> redux.max key -> redux.min id -> that lane shows its next
//          a lane keeps its two best at hand and looks through its keys again after the second win
//   slot k is lane k: it fetches logit indices[k] again (in L1) and scores it for the weight
//
// With groups a warp also lays its keys out in shared memory and picks groups the same way.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cstdint>

#include "common/dtype.h"
#include "topk_gate/score.cuh"

namespace kimi::gate {
namespace {  // each architecture's file has its own

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

// ---- a token -----------------------------------------------------------------------------------

// Of slot `lane`, where that is below k.
struct Choice {
  int32_t expert = 0;
  float weight = 0.0f;
};

// kValues * 32 >= E. bias_of(j): of expert lane + 32 j, 0 past the last one. `keys`: with groups the
// warp's own shared memory, keys [E] and group keys [num_groups].
template <class T, int kValues, class BiasOf>
__device__ Choice choose(const TopkGateParams& p, const T* logits, const BiasOf& bias_of,
                         int32_t* keys) {
  const int lane = lane_id(), num_experts = p.num_experts;
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
        if (lane + 32 * j < num_experts) sum = add_rn(sum, softmax_numerator<CudaOps>(z[j], peak));
      return sum;
    });
  }
  int32_t key[kValues];
  with_score(p.score_function, row, [&](auto score_of) {
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      const int e = lane + 32 * j;
      const float choice = add_rn(score_of(z[j]), bias_of(j));
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
      if (const Pick candidate{key[j], lane + 32 * j}; candidate.after(pick)) best.offer(candidate);
  }

  float u = 0.0f, total = 0.0f;
  if (lane < p.top_k) u = score(clean<CudaOps>(to_float(logits[chosen])), p.score_function, row);
  for (int slot = 0; slot < p.top_k; ++slot) total = add_rn(total, warp_broadcast(u, slot));
  const float scale = p.renormalize
                          ? div_rn(p.scaling_factor, add_rn(total, KIMI_TOPK_GATE_EPSILON))
                          : p.scaling_factor;
  return {chosen, mul_rn(u, scale)};
}

}  // namespace
}  // namespace kimi::gate
