// SPDX-License-Identifier: MIT
// What the losses take: sizes and options, checked before anything is allocated or launched.
#pragma once

#include <cmath>

#include "balance/balance.h"
#include "topk_gate/check.h"

namespace kimi::balance {

template <class Params>
Status check_rows(const char* op, const Params& p) {
  if (p.num_tokens > INT32_MAX)
    return invalid(op, ": num_tokens: expected 0..2147483647, got ", p.num_tokens);
  return gate::check_logits(op, p);
}

// Sizes of indices and sequences; check_rows has been called, or there are no logits.
template <class Params>
Status check_sequences(const char* op, const Params& p) {
  if (p.top_k < 1)
    return invalid(op, ": indices: expected at least one id a token, got shape [T, ", p.top_k, "]");
  if (p.num_sequences < 1 || (!p.offsets && p.num_tokens % p.num_sequences != 0))
    return invalid(op, ": num_sequences: expected a divisor of the ", p.num_tokens, " tokens, got ",
                   p.num_sequences);
  return Status::ok();
}

template <class Params>
Status check_loss(const char* op, const Params& p) {
  KIMI_RETURN_IF_ERROR(check_rows(op, p));
  KIMI_RETURN_IF_ERROR(gate::check_score(op, p));
  return check_sequences(op, p);
}

inline Status check_counts(const char* op, const SequenceCountsParams& p) {
  if (p.num_tokens < 0 || p.num_tokens > INT32_MAX)
    return invalid(op, ": num_tokens: expected 0..2147483647, got ", p.num_tokens);
  KIMI_RETURN_IF_ERROR(
      gate::between(op, "num_experts", p.num_experts, 1, KIMI_TOPK_GATE_MAX_EXPERTS));
  return check_sequences(op, p);
}

inline Status check_bins(const char* op, const QuantileHistogramParams& p) {
  KIMI_RETURN_IF_ERROR(check_rows(op, p));
  KIMI_RETURN_IF_ERROR(gate::check_score(op, p));
  return gate::between(op, "histogram.shape[1]", p.num_bins, 1, 1 << 20);
}

// The ends of the bins, where the host can read them.
inline Status check_bounds(const char* op, const float* bounds) {
  if (bounds[0] < bounds[1] && std::isfinite(bounds[1] - bounds[0])) return Status::ok();
  return invalid(op, ": bounds: expected two finite numbers low < high, got ", bounds[0], ", ",
                 bounds[1]);
}

}  // namespace kimi::balance
