// SPDX-License-Identifier: MIT
#include "cpu/vec_avx512.h"
#include "newton_schulz/newton_schulz_simd.h"

namespace kimi::newton_schulz_cpu {
extern const CpuEngine kAvx512Engine = kEngine<cpu::Avx512>;
}  // namespace kimi::newton_schulz_cpu
