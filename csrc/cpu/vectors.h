// SPDX-License-Identifier: MIT
// The walk over elements in vectors of cpu/vec_*.h. Included by engine files only.
#pragma once

#include <stdint.h>

namespace kimi::cpu {
namespace {  // every engine file has its own copy

// body(first, left) for n elements: whole vectors with a constant O::kLanes, then what is left.
template <class O, class Body>
void vectors(int64_t n, const Body& body) {
  int64_t j = 0;
  for (; j + O::kLanes <= n; j += O::kLanes) body(j, O::kLanes);
  if (j < n) body(j, int(n - j));
}

}  // namespace
}  // namespace kimi::cpu
