// SPDX-License-Identifier: MIT
// The grid of scales beside quantised weights.
#pragma once

#include <cstdint>

namespace kimi {

inline constexpr int64_t kFp8Block = 128;  // rows and columns of the block of an fp32 scale
inline constexpr int64_t kInt4Group = 32;  // columns of a row that a bf16 scale is for

}  // namespace kimi
