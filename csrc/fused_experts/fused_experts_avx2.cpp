// SPDX-License-Identifier: MIT
#include "cpu/vec_avx2.h"
#include "fused_experts/fused_experts_simd.h"

namespace kimi::experts {
extern const CpuEngine kAvx2Engine = kEngine<cpu::Avx2>;
}  // namespace kimi::experts
