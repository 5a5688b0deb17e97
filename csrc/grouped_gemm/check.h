// SPDX-License-Identifier: MIT
#pragma once

#include <sstream>

#include "common/status.h"

namespace kimi {

// 0 <= offsets[0] <= ... <= offsets[E - 1] <= R, and starts between them where there are any; where
// the host can read them.
template <class Int>
Status check_offsets(const char* op, const Int* offsets, int64_t num_experts, int64_t num_rows,
                     const Int* starts = nullptr) {
  int64_t before = 0;
  bool good = true;
  for (int64_t e = 0; e < num_experts; ++e) {
    if (starts && (starts[e] < before || starts[e] > offsets[e]))
      return invalid(op, ": starts[", e, "]: expected ", before, "..", offsets[e],
                     ", between the end of the group before and its own, got ", starts[e],
                     "; pass groups in the order of their rows");
    good = good && offsets[e] >= before;
    before = offsets[e];
  }
  if (good && before <= num_rows) return Status::ok();
  std::ostringstream list;
  for (int64_t e = 0; e < num_experts && e < 8; ++e) list << (e ? ", " : "") << offsets[e];
  return invalid(op, ": offsets: expected 0 <= offsets[0] <= ... <= offsets[-1] <= R = ", num_rows,
                 ", got [", list.str(), num_experts > 8 ? ", ...]" : "]",
                 "; pass the cumulative sum of the group sizes");
}

}  // namespace kimi
