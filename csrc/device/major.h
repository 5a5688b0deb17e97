// SPDX-License-Identifier: MIT
//
// How a tile of an operand lies in memory, for every kernel of products and what chooses them.
#pragma once

namespace kimi {

enum class Major { kDepth, kOuter };  // the dimension that is contiguous

}  // namespace kimi
