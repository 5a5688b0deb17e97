// SPDX-License-Identifier: MIT
#include "fused_experts/fused_experts_simd.h"
#include "topk_gate/ops_avx512.h"

namespace kimi::experts {

extern const CpuEngine kAvx512Engine = engine_of<gate::Avx512>();

}  // namespace kimi::experts
