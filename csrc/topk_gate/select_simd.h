// SPDX-License-Identifier: MIT
// The selection among the choice scores c of one row for SIMD engines: groups, the bound, the
// candidates, their rank. topk_gate_simd.h has the picture. A template over `O`; included by the
// ISA files only. Rows are padded with NaN to whole vectors.
#pragma once

#include <stdint.h>

#include "topk_gate/score_row_simd.h"
#include "topk_gate/topk_gate.h"

namespace kimi::gate {
namespace {  // every ISA file must have its own copy: nothing here may be merged by the linker

constexpr int kMaxCandidates = 64;

// position[i] = how many of `count` values come before value i: the larger ones, and equal ones that
// stand before it. Both arrays have room for a vector more.
template <class O>
void rank(float* values, int count, int32_t* position) {
  O::store(values + count, O::set(__builtin_nanf("")));
  for (int i = 0; i < count; i += O::kLanes) {
    const typename O::F mine = O::load(values + i);
    typename O::I before = O::zero_counts();
    for (int j = 0; j < count; j += O::kLanes)
      for (int l = 0; l < O::kLanes; ++l)
        before = O::count_greater(before, O::set(values[j + l]), mine);
    O::store_counts(position + i, before);
  }
  int total = 0;
  for (int i = 0; i < count; ++i) total += position[i];
  if (total == count * (count - 1) / 2) return;  // all differ
  for (int i = 0; i < count; ++i)
    for (int j = 0; j < i; ++j) position[i] += values[j] == values[i];
}

// select_groups for groups of whole vectors, at most kMaxCandidates of them, that score by their
// best one or two.
template <class O>
void select_vector_groups(const TopkGateParams& p, const float* choice, bool* kept) {
  using F = typename O::F;
  const int size = p.num_experts / p.num_groups;
  alignas(64) float score[kMaxCandidates + 16];
  int32_t position[kMaxCandidates + 16];
  for (int group = 0; group < p.num_groups; ++group) {
    F first = O::set(-__builtin_inff()), second = first;
    for (int e = group * size; e < (group + 1) * size; e += O::kLanes) {
      const F c = O::load(choice + e);
      second = O::max(second, O::min(first, c));
      first = O::max(first, c);
    }
    const auto join = [&](F other_first, F other_second) {
      second = O::max(O::min(first, other_first), O::max(second, other_second));
      first = O::max(first, other_first);
    };
    if constexpr (O::kLanes == 16)
      join(O::template exchange<8>(first), O::template exchange<8>(second));
    join(O::template exchange<4>(first), O::template exchange<4>(second));
    join(O::template exchange<2>(first), O::template exchange<2>(second));
    join(O::template exchange<1>(first), O::template exchange<1>(second));
    const float sum =
        O::first_lane(first) + (p.group_score_topk == 2 ? O::first_lane(second) : 0.0f);
    score[group] = sum == sum ? sum : -__builtin_inff();
  }
  rank<O>(score, p.num_groups, position);
  for (int group = 0; group < p.num_groups; ++group) kept[group] = position[group] < p.topk_groups;
}

// Marks the experts outside the best groups and takes the lane maxima again.
template <class O, int kBound>
void apply_groups(const TopkGateParams& p, float* choice, float* lanes) {
  using F = typename O::F;
  constexpr int kVectors = kBound / O::kLanes;
  bool kept[kMaxExperts];
  const int size = p.num_experts / p.num_groups;
  if (size % O::kLanes == 0 && p.num_groups <= kMaxCandidates && p.group_score_topk <= 2)
    select_vector_groups<O>(p, choice, kept);
  else
    select_groups(p, choice, kept);
  for (int group = 0; group < p.num_groups; ++group) {
    const float mark = kept[group] ? 0.0f : __builtin_nanf("");  // a choice + 0 keeps its order
    for (int e = group * size; e < (group + 1) * size; ++e) choice[e] += mark;
  }
  F top[kVectors];
  for (int v = 0; v < kVectors; ++v) top[v] = O::set(-__builtin_inff());
  int e = 0;
  for (; e + kBound <= p.num_experts; e += kBound)
    for (int v = 0; v < kVectors; ++v) top[v] = O::max(O::load(choice + e + v * O::kLanes), top[v]);
  for (int v = 0; e < p.num_experts; e += O::kLanes, ++v)
    top[v] = O::max(O::load(choice + e), top[v]);
  for (int v = 0; v < kVectors; ++v) O::store(lanes + v * O::kLanes, top[v]);
}

// The K-th largest of `lanes` [kBound]: the least value that fewer than K others exceed.
template <class O, int kBound>
float kth_largest(const float* lanes, int k) {
  constexpr int kVectors = kBound / O::kLanes;
  typename O::F value[kVectors], least = O::set(__builtin_inff());
  typename O::I above[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    value[v] = O::load(lanes + v * O::kLanes);
    above[v] = O::zero_counts();
  }
  for (int l = 0; l < kBound; ++l) {
    const typename O::F other = O::set(lanes[l]);
    for (int v = 0; v < kVectors; ++v) above[v] = O::count_greater(above[v], other, value[v]);
  }
  for (int v = 0; v < kVectors; ++v)
    least =
        O::min(least, O::select(O::count_below(above[v], k), value[v], O::set(__builtin_inff())));
  return O::reduce_min(least);
}

// out = k ids: those above `bound`, then those at it, each ascending. False, with `out` to be
// thrown away, where k or more lie above.
template <class O>
bool collect_from(const float* choice, int num_experts, float bound, int k, int32_t* out) {
  const typename O::F at = O::set(bound);
  int count = 0;
  const auto append = [&](int e, unsigned lanes) {
    for (; lanes && count < k; lanes &= lanes - 1) out[count++] = e + __builtin_ctz(lanes);
  };
  for (int e = 0; e < num_experts; e += O::kLanes) {
    append(e, O::bits(O::less(at, O::load(choice + e))));
    if (count == k) return false;
  }
  for (int e = 0; count < k; e += O::kLanes) {
    const typename O::F c = O::load(choice + e);
    append(e, O::bits(O::at_least(c, at)) & ~O::bits(O::less(at, c)));
  }
  return true;
}

// out = the k best ids and at most kMaxCandidates in all, for a row in which more reach `bound`;
// returns how many.
template <class O>
int collect_fewer(const float* choice, int num_experts, float bound, int k, int32_t* out) {
  if (collect_from<O>(choice, num_experts, bound, k, out)) return k;
  // At least k choices reach low, fewer than k reach high; low ends as the k-th largest.
  int64_t low = sort_key(bound), high = int64_t{sort_key(__builtin_inff())} + 1;
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    const float raised = value_of_key(int32_t(middle));
    int reach = 0;
    for (int e = 0; e < num_experts; e += O::kLanes)
      reach += __builtin_popcount(O::bits(O::at_least(O::load(choice + e), O::set(raised))));
    (reach >= k ? low : high) = middle;
    if (reach >= k && reach <= kMaxCandidates)
      return O::collect(choice, num_experts, raised, kMaxCandidates, out);
  }
  collect_from<O>(choice, num_experts, value_of_key(int32_t(low)), k, out);
  return k;
}

}  // namespace
}  // namespace kimi::gate
