// SPDX-License-Identifier: MIT
#include "cpu/vec_avx512.h"
#include "fused_experts/fused_experts_simd.h"

namespace kimi::experts {
extern const CpuEngine kAvx512Engine = kEngine<cpu::Avx512>;
}  // namespace kimi::experts
