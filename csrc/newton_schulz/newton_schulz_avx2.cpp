// SPDX-License-Identifier: MIT
#include "cpu/vec_avx2.h"
#include "newton_schulz/newton_schulz_simd.h"

namespace kimi::newton_schulz_cpu {
extern const CpuEngine kAvx2Engine = kEngine<cpu::Avx2>;
}  // namespace kimi::newton_schulz_cpu
