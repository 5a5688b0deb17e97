// SPDX-License-Identifier: MIT
// One token of the gate by one warp: estimates say which experts can be chosen, exact scores choose.
//
//   a[E]        estimates of the choice scores, in registers; experts by fours a lane, one load
//   lane        its largest a, for K > 8 its two largest
//   tau         the K-th of the warp's: K rounds of redux.max
//   candidates  ids with a >= candidates_from(tau), filter.h: about 1.1 K, side by side in shared
//               memory, placed by ballots
//   lane i      candidate i: fetches its logit again (in L1), scores it; its slot is the number of
//               candidates with a larger key, or an equal one and a lower id
//   slot k      weight from the exact scores, summed in the order of the slots
//
// Only a sigmoid without groups, chosen by scores, has estimates. Otherwise a[E] are the exact choices, as they are for
// a row of fewer than K candidates (NaN) or more than 32 (saturated or equal scores): scored in a
// loop into shared memory, where groups exclude theirs; the bound is tau. Of a row whose ties still
// are too many, K rounds over all keys choose.
//
// Softmax sums in the order of lane l owning experts l, l+32, l+64, ...; rows that no four-fold load
// fits are read so as well.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cstdint>

#include "common/dtype.h"
#include "device/clock.cuh"
#include "device/estimate.cuh"
#include "device/vec.cuh"
#include "topk_gate/filter.h"
#include "topk_gate/pick.cuh"
#include "topk_gate/score.cuh"

namespace kimi::gate {
namespace {  // each architecture's file has its own

// Shared memory of a warp, beyond keys.
struct alignas(16) Board {
  float choice[kWarpSize];    // of a candidate; NaN beyond the last
  int32_t id[kWarpSize];      // of a candidate
  int32_t chosen[kWarpSize];  // of a slot
  float score[kWarpSize];     // of a slot; 0 beyond K
};

// Which experts a lane's values belong to; they rise with j.
struct Layout {
  bool wide;  // neighbours by fours, each four by one load
  __device__ int expert(int j) const {
    return wide ? 4 * lane_id() + j % 4 + 128 * (j / 4) : lane_id() + 32 * j;
  }
  /// The same without a branch, for a j that only the lane knows.
  __device__ int expert_of(uint32_t j) const {
    return static_cast<int>((static_cast<uint32_t>(lane_id()) << (wide ? 2 : 0)) +
                            ((j & 3) << (wide ? 0 : 5)) + (j >> 2 << 7));
  }
};

__device__ inline bool estimated(const TopkGateParams& p) {
  return p.score_function == KIMI_SCORE_SIGMOID && p.num_groups == 1 && !p.select_logits;
}

template <class T>
__device__ Layout layout_of(const TopkGateParams& p) {
  const uintptr_t rows =
      reinterpret_cast<uintptr_t>(p.logits) | static_cast<uintptr_t>(p.logits_stride) * sizeof(T);
  const uintptr_t bias = reinterpret_cast<uintptr_t>(p.expert_bias);
  return {estimated(p) && p.num_experts >= 4 * kWarpSize && p.num_experts % 4 == 0 &&
          rows % sizeof(Vec<T, 4>) == 0 && bias % sizeof(Vec<float, 4>) == 0};
}

// The lane's values of a row [E]; `absent` beyond its end.
template <class T, int kValues>
__device__ inline void load_row(const T* row, int num_experts, Layout at, float absent,
                                float (&v)[kValues]) {
  if (at.wide) {
#pragma unroll
    for (int j = 0; j < kValues; j += 4) {
      Vec<T, 4> four;
#pragma unroll
      for (int i = 0; i < 4; ++i) four[i] = from_float<T>(absent);
      if (at.expert(j) < num_experts)
        four = *reinterpret_cast<const Vec<T, 4>*>(row + at.expert(j));
#pragma unroll
      for (int i = 0; i < 4; ++i) v[j + i] = to_float(four[i]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kValues; ++j)
      v[j] = at.expert(j) < num_experts ? to_float(row[at.expert(j)]) : absent;
  }
}

// The choice of an expert with logit z; every NaN chooses as -inf.
__device__ inline float choice_of(const TopkGateParams& p, int expert, float z, float score) {
  if (p.select_logits) score = clean<CudaOps>(z);
  const float choice = add_rn(score, p.expert_bias != nullptr ? p.expert_bias[expert] : 0.0f);
  return z != z || choice != choice ? -INFINITY : choice;
}

template <int kValues>
__device__ inline void load_bias_row(const TopkGateParams& p, Layout at, float (&bias)[kValues]) {
  load_row(p.expert_bias, p.expert_bias != nullptr ? p.num_experts : 0, at, 0.0f, bias);
}

// ---- choices -----------------------------------------------------------------------------------

// keys [E] of the exact choices, in the warp's shared memory.
template <class T>
__device__ RowScale exact_keys(const TopkGateParams& p, const T* logits, int32_t* keys) {
  const auto each = [&](auto visit) {
#pragma unroll 2
    for (int e = lane_id(); e < p.num_experts; e += kWarpSize) visit(e, to_float(logits[e]));
  };
  RowScale row;
  if (p.score_function == KIMI_SCORE_SOFTMAX) {
    float largest = -FLT_MAX;
    each([&](int, float z) { largest = fmaxf(largest, clean<CudaOps>(z)); });
    row = softmax_scale(largest, [&](float peak) {
      float sum = 0.0f;
      each([&](int, float z) {
        sum = add_rn(sum, softmax_numerator<CudaOps>(clean<CudaOps>(z), peak));
      });
      return sum;
    });
  }
  warp_barrier();  // the previous token's readers are done
  with_score(p.score_function, row, [&](auto score_of) {
    each([&](int e, float z) {
      keys[e] = sort_key(choice_of(p, e, z, score_of(clean<CudaOps>(z))));
    });
  });
  warp_barrier();
  return row;
}

template <class T, int kValues, class LoadBias>
__device__ void estimate_choices(const TopkGateParams& p, const T* logits, Layout at,
                                 const LoadBias& load_bias, float (&estimate)[kValues]) {
  float bias[kValues];
  load_row(logits, p.num_experts, at, NAN, estimate);
  load_bias(bias);
#pragma unroll
  for (int j = 0; j < kValues; ++j)
    estimate[j] = add_rn(sigmoid_estimate<EstimateOps>(estimate[j]), bias[j]);
}

// ---- candidates --------------------------------------------------------------------------------

// The K-th largest of the lanes' one or two largest, -inf if they are fewer; equal ones of several
// lanes count once, which only lowers it.
template <int kValues>
__device__ float kth_of_lanes(const float (&a)[kValues], int k) {
  const int32_t lowest = sort_key(-INFINITY);
  float first = -INFINITY, second = -INFINITY;
  int32_t best = lowest;
  if (k <= 8) {
#pragma unroll
    for (int j = 0; j < kValues; ++j) first = fmaxf(first, a[j]);
    int32_t key = sort_key(first);
    for (int i = 0; i < k; ++i) {
      best = warp_max(key);
      if (key == best) key = lowest;
    }
  } else {
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      second = a[j] > first ? first : fmaxf(second, a[j]);
      first = fmaxf(first, a[j]);
    }
    int32_t key = sort_key(first), next = sort_key(second);
    for (int i = 0; i < k; ++i) {
      best = warp_max(key);
      if (key != best) continue;
      key = next;
      next = lowest;
    }
  }
  return value_of_key(best);
}

// board.id: the experts with a >= bound, in any order; how many, or 33 where they are more, or more
// than 7 of one lane.
template <int kValues>
__device__ int collect(const float (&a)[kValues], Layout at, float bound, Board& board) {
  uint32_t mine = 0;
#pragma unroll
  for (int j = 0; j < kValues; ++j) mine |= a[j] >= bound ? 1u << j : 0u;
  const uint32_t lanes_below = (1u << lane_id()) - 1;
  const int own = __popc(mine);
  int place = 0, found = 0;
#pragma unroll
  for (int bit = 0; bit < 3; ++bit) {
    const uint32_t lanes = warp_ballot((own >> bit & 1) != 0);
    place += __popc(lanes & lanes_below) << bit;
    found += __popc(lanes) << bit;
  }
  if (warp_ballot(own > 7) != 0 || found > kWarpSize) return kWarpSize + 1;
  for (; mine != 0; mine &= mine - 1)
    board.id[place++] = at.expert_of(static_cast<uint32_t>(__ffs(static_cast<int>(mine)) - 1));
  return found;
}

// ---- a token -----------------------------------------------------------------------------------

// Of slot `lane`, where that is below k.
struct Choice {
  int32_t expert = 0;
  float weight = 0.0f;
};

// kValues * 32 >= E, a multiple of 4. load_bias(b): b[j] is that of expert at.expert(j), 0 past the
// last. `keys`: the warp's own shared memory, keys [E] and group keys [num_groups].
template <class T, int kValues, class LoadBias>
__device__ Choice choose(const TopkGateParams& p, const T* logits, Layout at,
                         const LoadBias& load_bias, Board& board, int32_t* keys) {
  const int lane = lane_id(), top_k = p.top_k;
  const auto exact = [&](int e, RowScale row, float& z) {
    z = to_float(logits[e]);
    return score(clean<CudaOps>(z), p.score_function, row);
  };
  float a[kValues];
  RowScale row;
  int found = 0;
  const auto enough = [&] { return found >= top_k && found <= kWarpSize; };
  clock_mark(0);
  if (estimated(p)) {
    estimate_choices(p, logits, at, load_bias, a);
    clock_mark(1);
    const float tau = kth_of_lanes(a, top_k);
    clock_mark(2);
    if (tau > -INFINITY)
      found = collect(a, at, candidates_from<CudaOps>(tau, kSigmoidError), board);
  }
  if (!enough()) {
    row = exact_keys(p, logits, keys);
    if (p.num_groups > 1) exclude_groups(p, keys, keys + p.num_experts);
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      const int e = at.expert(j);
      a[j] = value_of_key(e < p.num_experts ? keys[e] : kExcluded);
    }
    found = collect(a, at, kth_of_lanes(a, top_k), board);
  }
  clock_mark(3);
  int32_t id = 0;
  float z = 0.0f, u = 0.0f;
  if (enough()) {
    warp_barrier();
    float mine = NAN;
    if (lane < found) {
      id = board.id[lane];
      u = exact(id, row, z);
      mine = add_rn(choice_of(p, id, z, u), 0.0f);  // -0 is +0
    }
    board.choice[lane] = mine;
    clock_mark(4);
    uint32_t equal = warp_match(bits_of(mine)) & ~(1u << lane);
    warp_barrier();
    float larger = 0.0f;
#pragma unroll 1
    for (int i = 0; i < found; i += 4) {
      const Vec<float, 4> four = *reinterpret_cast<const Vec<float, 4>*>(board.choice + i);
#pragma unroll
      for (int j = 0; j < 4; ++j) larger += four[j] > mine ? 1.0f : 0.0f;
    }
    int slot = lane < found ? static_cast<int>(larger) : kWarpSize;
    for (; equal != 0 && lane < found; equal &= equal - 1)
      slot += board.id[__ffs(static_cast<int>(equal)) - 1] < id ? 1 : 0;
    if (slot < top_k) {
      board.chosen[slot] = id;
      board.score[slot] = u;
    }
  } else {
    Pick last{INT32_MAX, 0};
    for (int slot = 0; slot < top_k; ++slot) {
      last = warp_next(keys, p.num_experts, last);
      if (lane == slot) id = last.id;
    }
    if (lane < top_k) {
      board.chosen[lane] = id;
      board.score[lane] = exact(id, row, z);
    }
  }
  if (lane >= top_k) board.score[lane] = 0.0f;
  warp_barrier();
  clock_mark(5);
  float total = 0.0f;
#pragma unroll 1
  for (int i = 0; i < top_k; i += 4) {  // scores are no -0: 0 beyond K changes nothing
    const Vec<float, 4> four = *reinterpret_cast<const Vec<float, 4>*>(board.score + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) total = add_rn(total, four[j]);
  }
  const float scale = p.renormalize
                          ? div_rn(p.scaling_factor, add_rn(total, KIMI_TOPK_GATE_EPSILON))
                          : p.scaling_factor;
  clock_mark(6);
  return {board.chosen[lane], mul_rn(board.score[lane], scale)};
}

}  // namespace
}  // namespace kimi::gate
