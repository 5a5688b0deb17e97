// SPDX-License-Identifier: MIT
// What may be limited of the GPU: the newest compute capability whose kernels run, and the overlap
// of kernels.
#pragma once

#include "common/status.h"

namespace kimi {

inline constexpr int kMinSm = 80;

// 10 major + minor; 0: no limit. At first KIMI_OPS_SM.
int max_sm();
Status set_max_sm(int sm);

// Whether a kernel may begin while the one before it ends (device/overlap.cuh). KIMI_OPS_OVERLAP=0
// says no, for measurements.
bool overlap_allowed();

}  // namespace kimi
