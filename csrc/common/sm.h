// SPDX-License-Identifier: MIT
// The newest compute capability whose kernels may run.
#pragma once

#include "common/status.h"

namespace kimi {

inline constexpr int kMinSm = 80;

// 10 major + minor; 0: no limit. At first KIMI_OPS_SM.
int max_sm();
Status set_max_sm(int sm);

}  // namespace kimi
