// SPDX-License-Identifier: MIT
#include "cpu/vec_math_avx2.h"
#include "newton_schulz/newton_schulz_simd.h"

namespace kimi::newton_schulz_cpu {
extern const CpuEngine kAvx2Engine = kEngine<cpu::Avx2Math>;
}  // namespace kimi::newton_schulz_cpu
