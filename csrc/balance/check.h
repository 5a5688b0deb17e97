// SPDX-License-Identifier: MIT
// What the losses take: sizes and options, checked before anything is allocated or launched.
#pragma once

#include "balance/balance.h"
#include "topk_gate/check.h"

namespace kimi::balance {

template <class Params>
Status check_rows(const char* op, const Params& p) {
  if (p.num_tokens > INT32_MAX)
    return invalid(op, ": num_tokens: expected 0..2147483647, got ", p.num_tokens);
  return gate::check_logits(op, p);
}

template <class Params>
Status check_sequences(const char* op, const Params& p) {
  KIMI_RETURN_IF_ERROR(check_rows(op, p));
  if (p.top_k < 1)
    return invalid(op, ": indices: expected at least one id a token, got shape [T, ", p.top_k, "]");
  KIMI_RETURN_IF_ERROR(gate::check_score(op, p));
  if (p.num_sequences < 1 || p.num_tokens % p.num_sequences != 0)
    return invalid(op, ": num_sequences: expected a divisor of the ", p.num_tokens, " tokens, got ",
                   p.num_sequences);
  return Status::ok();
}

}  // namespace kimi::balance
