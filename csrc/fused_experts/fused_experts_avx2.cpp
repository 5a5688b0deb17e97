// SPDX-License-Identifier: MIT
#include "fused_experts/fused_experts_simd.h"
#include "topk_gate/ops_avx2.h"

namespace kimi::experts {

extern const CpuEngine kAvx2Engine = engine_of<gate::Avx2>();

}  // namespace kimi::experts
