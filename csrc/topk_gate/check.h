// SPDX-License-Identifier: MIT
// What topk_gate takes: its options, checked before anything is allocated or launched. A message
// names an argument as the Python function does.
#pragma once

#include <algorithm>

#include "common/dtype.h"
#include "common/status.h"
#include "common/strides.h"
#include "topk_gate/topk_gate.h"

namespace kimi::gate {

inline Status between(const char* op, const char* name, int64_t value, int64_t low, int64_t high) {
  if (low <= value && value <= high) return Status::ok();
  return invalid(op, ": ", name, ": expected ", low, "..", high, ", got ", value);
}

template <class Params>
Status check_logits(const char* op, const Params& p) {
  if (p.num_tokens < 0) return invalid(op, ": num_tokens: expected 0 or more, got ", p.num_tokens);
  KIMI_RETURN_IF_ERROR(
      between(op, "logits.shape[1]", p.num_experts, 1, KIMI_TOPK_GATE_MAX_EXPERTS));
  if (!is_dtype(p.logits_dtype))
    return invalid(op, ": logits_dtype: expected a kimi_dtype (0..2), got ", int(p.logits_dtype));
  if (p.logits_stride < 0)
    return invalid(op, ": logits_stride: expected 0 or more elements, got ", p.logits_stride);
  return check_strides(op, "logits_stride", {{p.num_tokens, p.logits_stride}});
}

template <class Params>
Status check_score(const char* op, const Params& p) {
  if (p.score_function >= KIMI_SCORE_SIGMOID && p.score_function <= KIMI_SCORE_SQRTSOFTPLUS)
    return Status::ok();
  return invalid(op, ": score_function: expected a kimi_score_function (0..2), got ",
                 int(p.score_function));
}

template <class Params>
Status check_scaling(const char* op, const Params& p) {
  if (p.scaling_factor != 0) return Status::ok();
  return invalid(op, ": scaling_factor: expected a number other than 0, got 0; 1 leaves the ",
                 "weights as they are");
}

inline Status check_options(const char* op, const TopkGateParams& p) {
  KIMI_RETURN_IF_ERROR(check_logits(op, p));
  KIMI_RETURN_IF_ERROR(check_score(op, p));
  KIMI_RETURN_IF_ERROR(check_scaling(op, p));
  KIMI_RETURN_IF_ERROR(between(op, "num_groups", p.num_groups, 1, p.num_experts));
  if (p.num_experts % p.num_groups != 0)
    return invalid(op, ": num_groups: expected a divisor of the ", p.num_experts, " experts, got ",
                   p.num_groups);
  const int32_t size = p.num_experts / p.num_groups;
  KIMI_RETURN_IF_ERROR(between(op, "topk_groups", p.topk_groups, 1, p.num_groups));
  const int32_t most = std::min(KIMI_TOPK_GATE_MAX_K, p.topk_groups * size);
  if (p.top_k < 1 || p.top_k > most)
    return invalid(op, ": k: expected 1..", most, " (at most ", KIMI_TOPK_GATE_MAX_K, ", and ",
                   p.topk_groups, " group(s) of ", size, " experts take part), got ", p.top_k);
  if (p.num_groups > 1 && (p.group_score_topk < 1 || p.group_score_topk > size))
    return invalid(op, ": group_score_topk: expected 1..", size, " (experts of a group), got ",
                   p.group_score_topk);
  return Status::ok();
}

template <class Params>
Status check_pointers(const char* op, const Params& p) {
  if (p.num_tokens > 0 && (!p.logits || !p.indices))
    return invalid(op, ": logits, indices: expected pointers, got NULL");
  return Status::ok();
}

// Ids in -1 .. E, where the host can read them.
inline Status check_ids(const char* op, const int32_t* ids, int64_t count, int32_t num_experts) {
  const auto [low, high] = std::minmax_element(ids, ids + count);
  if (count == 0 || (*low >= -1 && *high <= num_experts)) return Status::ok();
  return invalid(op, ": ids: expected -1 .. ", num_experts, ", got ", *low, " .. ", *high,
                 "; mark slots without an expert with -1");
}

// What given and backward calls take: K ids a token.
template <class Params>
Status check_given(const char* op, const Params& p, const char* ids) {
  KIMI_RETURN_IF_ERROR(check_logits(op, p));
  KIMI_RETURN_IF_ERROR(check_score(op, p));
  KIMI_RETURN_IF_ERROR(check_scaling(op, p));
  return between(op, ids, p.top_k, 1, std::min(p.num_experts, KIMI_TOPK_GATE_MAX_K));
}

template <class Params>
Status check_outputs(const char* op, const Params& p) {
  KIMI_RETURN_IF_ERROR(check_pointers(op, p));
  if (!p.tokens_per_expert || (p.num_tokens > 0 && !p.weights))
    return invalid(op, ": weights, tokens_per_expert: expected pointers, got NULL");
  return Status::ok();
}

inline Status check_arguments(const char* op, const TopkGateParams& p) {
  KIMI_RETURN_IF_ERROR(check_options(op, p));
  return check_outputs(op, p);
}

}  // namespace kimi::gate
