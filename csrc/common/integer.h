// SPDX-License-Identifier: MIT
// Quotients and multiples of sizes: n >= 0, d > 0.
#pragma once

#include "common/dtype.h"

namespace kimi {

KIMI_HOST_DEVICE constexpr int64_t ceil_div(int64_t n, int64_t d) { return (n + d - 1) / d; }
KIMI_HOST_DEVICE constexpr int64_t round_up(int64_t n, int64_t d) { return ceil_div(n, d) * d; }

}  // namespace kimi
