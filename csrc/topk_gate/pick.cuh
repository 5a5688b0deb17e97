// SPDX-License-Identifier: MIT
// Selection by a warp from keys in its shared memory, one after the other: descending keys, the lower
// id first. For groups, and for rows in which too many scores tie.
#pragma once

#include <algorithm>
#include <cstdint>

#include "topk_gate/score.cuh"

namespace kimi::gate {
namespace {  // each architecture's file has its own

constexpr int32_t kNoId = INT32_MAX;

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

// Excludes the experts of all but the best groups from keys [E]. group_keys [num_groups].
__device__ inline void exclude_groups(const TopkGateParams& p, int32_t* keys, int32_t* group_keys) {
  const int lane = lane_id(), size = p.num_experts / p.num_groups;
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
  for (int e = lane; e < p.num_experts; e += kWarpSize)
    if (const int group = e / size; Pick{group_keys[group], group}.after(last)) keys[e] = kExcluded;
  warp_barrier();
}

}  // namespace
}  // namespace kimi::gate
