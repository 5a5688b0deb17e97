// SPDX-License-Identifier: MIT
// Products of sizes that a caller may make up; a negative one has wrapped already.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <limits>

namespace kimi {

// More elements or bytes than any memory has.
inline constexpr int64_t kTooMany = std::numeric_limits<int64_t>::max();

// kTooMany instead of a number that wraps.
template <class... Sizes>
constexpr int64_t volume(Sizes... sizes) {
  int64_t product = 1;
  bool wraps = false;
  for (int64_t size : {int64_t(sizes)...}) {
    if (size == 0) return 0;
    wraps |= size < 0 || __builtin_mul_overflow(product, size, &product);
  }
  return wraps ? kTooMany : product;
}

}  // namespace kimi
