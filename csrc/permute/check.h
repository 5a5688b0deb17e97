// SPDX-License-Identifier: MIT
// What permute_plan takes, checked before anything is allocated or launched.
#pragma once

#include <algorithm>
#include <limits>

#include "common/status.h"
#include "permute/permute.h"

namespace kimi::permutation {

inline Status check_plan(const PermutePlanParams& p, const char* op = "permute_plan") {
  constexpr int32_t kMost = std::numeric_limits<int32_t>::max();
  if (p.num_tokens < 0) return invalid(op, ": num_tokens: expected 0 or more, got ", p.num_tokens);
  if (p.top_k < 1) return invalid(op, ": indices.shape[1]: expected 1..", kMost, ", got ", p.top_k);
  if (p.num_experts < 1 || p.num_experts > KIMI_PERMUTE_MAX_EXPERTS)
    return invalid(op, ": num_experts: expected 1..", KIMI_PERMUTE_MAX_EXPERTS, ", got ",
                   p.num_experts);
  if (p.align < 1) return invalid(op, ": align: expected 1..", kMost, ", got ", p.align);
  const __int128 rows = __int128{p.num_tokens} * p.top_k + int64_t{p.num_experts} * (p.align - 1);
  if (rows > kMost)
    return invalid(op, ": indices: expected at most ", kMost,
                   " rows (row ids are int32), got T*K + E*(align-1) = ",
                   rows > std::numeric_limits<int64_t>::max() ? std::numeric_limits<int64_t>::max()
                                                              : int64_t(rows),
                   "; split the tokens");
  return Status::ok();
}

// Ids in -1 .. highest, where the host can read them.
inline Status check_ids(const char* op, const int32_t* ids, int64_t count, int32_t highest) {
  const auto [low, high] = std::minmax_element(ids, ids + count);
  if (count == 0 || (*low >= -1 && *high <= highest)) return Status::ok();
  return invalid(op, ": indices: expected ids in -1 .. ", highest, ", got ", *low, " .. ", *high,
                 "; mark dropped pairs with -1");
}

// Rows of pairs in -1 .. rows - 1: they are places in memory.
inline Status check_row_map(const char* op, const int32_t* row_map, int64_t pairs, int64_t rows) {
  const auto [low, high] = std::minmax_element(row_map, row_map + pairs);
  if (pairs == 0 || (*low >= -1 && *high < rows)) return Status::ok();
  return invalid(op, ": row_map: expected rows in -1 .. ", rows - 1, ", got ", *low, " .. ", *high,
                 "; pass the plan of these rows");
}

}  // namespace kimi::permutation
